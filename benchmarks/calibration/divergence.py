"""How far the distribution of the first token moves."""

import math
from collections.abc import Mapping


def divergence(full: Mapping[str, float], reduced: Mapping[str, float]) -> float:
    """KL divergence of the first token, full model to reduced one, in nats, from what a server reveals.

    A server names the most likely tokens only. Those that both name stay apart, all others are one outcome. Joining
    outcomes can only lessen the divergence, so this is a lower bound of it; it is exact where the others weigh nothing.

    Args:
        full: most likely first tokens of the full model, with log-probabilities.
        reduced: the same of the reduced one.
    """
    both = full.keys() & reduced.keys()
    p, q = ([math.exp(side[token]) for token in both] for side in (full, reduced))
    p.append(max(0.0, 1.0 - sum(p)))
    q.append(max(0.0, 1.0 - sum(q)))
    tiny = 1e-12
    return max(0.0, sum(a * math.log(a / max(b, tiny)) for a, b in zip(p, q, strict=True) if a > tiny))
