"""Reductions in the decoder for one image, written plainly: the rules of the oracle. Nothing of ours is used here."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BETA, GAMMA, EPSILON = 0.6, 0.6, 0.998
RECYCLED_SHARE, TOKENS_PER_CLUSTER = 0.3, 10


@dataclass
class Seen:
    """Inputs of a rule, float64.

    Attributes:
        tokens: (N, D) hidden states of the visual tokens.
        size: (N,) number of tokens that each represents.
        attention: (N, N) among them, head mean.
        text: (M, N) from the text tokens after the image, head mean.
        text_tokens: (M, D) hidden states of these.
    """

    tokens: np.ndarray
    size: np.ndarray
    attention: np.ndarray
    text: np.ndarray
    text_tokens: np.ndarray


# (inputs, number to remove) -> kept tokens, their hidden states, their sizes
Outcome = tuple[list[int], np.ndarray, np.ndarray]
Rule = Callable[[Seen, int], Outcome]


def ficoco_l(seen: Seen, removed: int) -> Outcome:
    """Algorithm 2. Nobody reads its sizes."""
    tokens, attention, text = seen.tokens, seen.attention, seen.text
    N = len(tokens)
    scores = [BETA * attention[i].sum() / N - (1 - BETA) * text[:, i].sum() for i in range(N)]
    order = sorted(range(N), key=lambda i: (-scores[i], i))
    source, target = sorted(order[:removed]), sorted(order[removed:])
    total = {j: tokens[j].copy() for j in target}
    weight = dict.fromkeys(target, 1.0)
    for i in source:
        row = GAMMA * attention[i, target] + (1 - GAMMA) * (text[:, i] @ text[:, target])
        threshold = np.quantile(row, EPSILON)
        chosen = [(j, value) for j, value in zip(target, row, strict=True) if value >= threshold]
        mass = sum(value for _, value in chosen)
        for j, value in chosen if mass > 0 else ():
            total[j] += value / mass * tokens[i]
            weight[j] += value / mass
    return target, np.stack([total[j] / weight[j] for j in target]), seen.size[target]


def prune_by_last(seen: Seen, removed: int) -> Outcome:
    """FastV and PyramidDrop: remove the tokens that the last token of the prompt attends to least."""
    return _prune(seen, seen.text[-1], removed)


def prune_by_both(seen: Seen, removed: int) -> Outcome:
    """FitPrune: remove the tokens that image and text together attend to least."""
    return _prune(seen, seen.attention.mean(axis=0) * seen.text.sum(axis=0), removed)


def _prune(seen: Seen, worth: np.ndarray, removed: int) -> Outcome:
    order = sorted(range(len(worth)), key=lambda i: (worth[i], i))
    stay = sorted(order[removed:])
    return stay, seen.tokens[stay], seen.size[stay]


def sparsevlm(seen: Seen, removed: int) -> Outcome:
    """SparseVLM: text raters choose; the best of the discarded tokens are merged into density peaks."""
    tokens = seen.tokens
    N, D = tokens.shape
    products = tokens @ seen.text_tokens.T
    alike = np.exp(products - products.max(axis=1, keepdims=True))
    alike = (alike / alike.sum(axis=1, keepdims=True)).mean(axis=0)
    raters = [k for k in range(len(alike)) if alike[k] > alike.mean()] or list(range(len(alike)))
    rated = seen.text[raters].mean(axis=0)
    order = sorted(range(N), key=lambda i: (-rated[i], i))
    for selected in range(N - removed, -1, -1):
        recycled = min(N - selected, int((N - selected) * RECYCLED_SHARE) + 1)
        clusters = min(recycled, recycled // TOKENS_PER_CLUSTER + 1)
        if selected + clusters <= N - removed:
            break
    else:
        clusters = N - removed
    selected = N - removed - clusters
    kept, pool = order[:selected], order[selected : selected + recycled]
    apart = np.array([[np.linalg.norm(tokens[a] - tokens[b]) for b in pool] for a in pool]) / D**0.5
    density = [float(np.exp(-np.mean(np.sort(row)[:clusters] ** 2))) for row in apart]
    peak = []
    for x in range(recycled):
        denser = [y for y in range(recycled) if (density[y], -y) > (density[x], -x)]
        peak.append(density[x] * min((apart[x, y] for y in denser), default=apart.max()))
    centres = sorted(range(recycled), key=lambda x: (-peak[x], x))[:clusters]
    stay = sorted(kept + [pool[x] for x in centres])
    members = {j: [j] for j in stay}
    for x in range(recycled):
        if x not in centres:
            nearest = min(centres, key=lambda y: (apart[x, y], pool[y]))
            members[pool[nearest]].append(pool[x])
    size = np.array([seen.size[members[j]].sum() for j in stay])
    merged = [np.average(tokens[members[j]], axis=0, weights=seen.size[members[j]]) for j in stay]
    return stay, np.stack(merged), size


RULES: dict[str, Rule] = {
    "ficoco-l": ficoco_l,
    "ficoco-vl": ficoco_l,
    "fastv": prune_by_last,
    "pyramiddrop": prune_by_last,
    "fitprune": prune_by_both,
    "sparsevlm": sparsevlm,
}
