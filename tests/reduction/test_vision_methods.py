"""The vision-side methods against plain float64 transcriptions, one image and one token at a time."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ficoco_vllm.reduction import Reduced, Signals, reduce
from ficoco_vllm.reduction.testing import make_signals, make_tokens
from tests.reduction import reference
from tests.reduction.transcription import transcribes

N, R = 36, 20
K = N - R


@pytest.fixture(params=[0, 1, 2])
def signals(request: pytest.FixtureRequest) -> Signals:
    return make_signals(1, N, seed=request.param, grid=(6, 7))


@pytest.fixture
def tokens() -> Tensor:
    return make_tokens(1, N)


def check(got: Reduced, signals: Signals, target: list[int], want: Tensor) -> None:
    extra = [-1] * (len(want) - len(target))
    assert got.position[0].tolist() == [*(int(signals.position[0, j]) for j in target), *extra]
    # fp32 sums of at most N terms against float64.
    torch.testing.assert_close(got.tokens[0].double(), want, rtol=1e-5, atol=1e-5)


def cosines(values: Tensor, source: list[int], target: list[int]) -> list[list[float]]:
    return [[reference.cosine(values[i], values[j]) for j in target] for i in source]


def lowest(values: Tensor) -> list[int]:
    """Indices of the K highest values, ascending."""
    return reference.split([-float(value) for value in values], R)[1]


@transcribes("tome", "turbo")
@pytest.mark.parametrize("alpha", [None, 10.0, 2.0])
def test_tome_and_turbo(signals: Signals, tokens: Tensor, alpha: float | None) -> None:
    """Eqs. 3, 6, 9 as printed: a plain mean. Turbo subtracts alpha times the [CLS] attention."""
    num_removed = 13
    keys = signals.keys[0]
    odd = list(range(1, N, 2))
    scores = [-math.inf] * N
    for i in range(0, N, 2):
        scores[i] = max(reference.cosine(keys[i], keys[j]) for j in odd)
        scores[i] -= (alpha or 0.0) * float(signals.cls_attention[0, i])
    source, target = reference.split(scores, num_removed)
    want = reference.mean_of_nearest(tokens[0], source, target, cosines(keys, source, target), odd)
    name, settings = ("tome", {}) if alpha is None else ("turbo", {"alpha": alpha})
    got = reduce(name, tokens, signals, num_removed, size_weighted=False, **settings)
    check(got, signals, target, want)


@transcribes("evit")
def test_evit(signals: Signals, tokens: Tensor) -> None:
    """Eqs. 4, 7, 10."""
    attention = signals.cls_attention[0]
    source, target = reference.split([-float(a) for a in attention], R)
    fused = sum(float(attention[i]) * tokens[0, i].double() for i in source)
    check(
        reduce("evit", tokens, signals, R), signals, target, torch.stack([*tokens[0, target].double(), fused])
    )


@transcribes("topk-cls")
def test_topk_cls(signals: Signals, tokens: Tensor) -> None:
    target = lowest(signals.cls_attention[0])
    check(reduce("topk-cls", tokens, signals, R), signals, target, tokens[0, target].double())


@transcribes("random")
@pytest.mark.parametrize("seed", [0, 7])
def test_random(signals: Signals, tokens: Tensor, seed: int) -> None:
    scores = []
    for value in signals.position[0].tolist():
        mixed = (value + seed * 0x9E3779B1) % 2**32
        for _ in range(2):
            mixed = ((mixed ^ (mixed >> 16)) * 0x045D9F3B) % 2**32
        scores.append(float((mixed ^ (mixed >> 16)) >> 8))
    target = reference.split(scores, R)[1]
    torch.manual_seed(5)  # the global generator plays no part
    check(reduce("random", tokens, signals, R, seed=seed), signals, target, tokens[0, target].double())


def test_random_spreads_and_depends_on_the_seed() -> None:
    full = Signals(position=torch.arange(576)[None], grid=(24, 24))
    kept = [reduce("random", torch.zeros(1, 576, 1), full, 288, seed=seed).position[0] for seed in (0, 1)]
    assert not torch.equal(*kept)
    for position in kept:
        quarters = torch.bincount(position // 144, minlength=4)
        assert ((quarters > 50) & (quarters < 94)).all(), "72 expected in each, 5 standard deviations"


def test_spatial_pool_on_the_full_grid() -> None:
    """64 of 24 x 24 patches: cells of 3 x 3, independent of the order of arithmetic."""
    full = Signals(position=torch.arange(576)[None], grid=(24, 24))
    tokens = make_tokens(1, 576)
    got = reduce("spatial-pool", tokens, full, 512)
    want = tokens.double().view(8, 3, 8, 3, -1).mean(dim=(1, 3)).flatten(0, 1)
    torch.testing.assert_close(got.tokens[0].double(), want, rtol=1e-5, atol=1e-5)
    assert got.size.tolist() == [[9.0] * 64]


@pytest.mark.parametrize("num_kept", [1, 5, 17, 42, 100, 192, 575])
def test_spatial_pool_cells_are_alike(num_kept: int) -> None:
    full = Signals(position=torch.arange(576)[None], grid=(24, 24))
    size = reduce("spatial-pool", torch.zeros(1, 576, 1), full, 576 - num_kept).size[0]
    assert size.sum() == 576
    assert size.min() >= 1
    # Bands and cuts are each off by at most one row or column.
    side = math.sqrt(576 / num_kept)
    assert size.max() <= (side + 2) ** 2


def test_spatial_pool_keeps_what_has_no_place() -> None:
    position = torch.cat([torch.arange(16), torch.tensor([-1])])[None]
    got = reduce("spatial-pool", make_tokens(1, 17), Signals(position=position, grid=(4, 5)), 13)
    assert got.size.sum() == 17
    assert got.position[0, 0] == 0


@transcribes("spatial-pool")
def test_spatial_pool_on_what_is_alive(signals: Signals, tokens: Tensor) -> None:
    rows, columns = signals.grid
    bands = max(1, min(rows, K, round(math.sqrt(K * rows / columns))), math.ceil(K / columns))
    cells: dict[tuple[int, int], list[int]] = {}
    for index, place in enumerate(signals.position[0].tolist()):
        band = place // columns * bands // rows
        cuts = K // bands + (band < K % bands)
        cells.setdefault((band, place % columns * cuts // columns), []).append(index)
    assert len(cells) == K, "no cell of this example is empty"
    groups = sorted(cells.values(), key=lambda group: group[0])
    want = torch.stack([tokens[0, group].double().mean(dim=0) for group in groups])
    check(reduce("spatial-pool", tokens, signals, R), signals, [group[0] for group in groups], want)


@transcribes("prumerge")
def test_prumerge(signals: Signals, tokens: Tensor) -> None:
    attention = [float(a) for a in signals.cls_attention[0].double()]
    source, target = reference.split([-a for a in attention], R)
    likeness = cosines(signals.keys[0], source, target)
    want = reference.add_neighbours(tokens[0], source, target, likeness, attention, 5, target)
    got = reduce("prumerge", tokens, signals, R, num_neighbours=5)
    check(got, signals, target, want)
    takers = reference.takers(likeness, 5)
    size = [1 + sum(1 / len(takers[i]) for i in takers if column in takers[i]) for column in range(K)]
    torch.testing.assert_close(got.size[0], torch.tensor(size), rtol=1e-5, atol=0)


@transcribes("prumerge-plus")
@pytest.mark.parametrize("num_kept", [2, 9, 16, 30])
def test_prumerge_plus(signals: Signals, tokens: Tensor, num_kept: int) -> None:
    # Seven values above the fence, three of them just above it.
    order = signals.cls_attention[0].argsort()
    spread = torch.linspace(0.4, 0.6, N)
    spread[-7:] = torch.tensor([0.81, 0.82, 0.83, 1.2, 1.3, 1.4, 1.5])
    signals = replace(signals, cls_attention=torch.zeros(1, N).scatter(1, order[None], spread[None]))
    attention = [float(a) for a in signals.cls_attention[0].double()]
    first, third = reference.quantile(attention, 0.25), reference.quantile(attention, 0.75)
    outliers = [i for i, a in enumerate(attention) if a > third + 1.5 * (third - first)]
    assert len(outliers) == 7
    if len(outliers) >= num_kept:
        target = sorted(sorted(outliers, key=lambda i: -attention[i])[:num_kept])
    else:
        others, wanted = [i for i in range(N) if i not in outliers], num_kept - len(outliers)
        middle = len(others) // 2
        even = [
            i
            for place, i in enumerate(others)
            if ((place + 1) * wanted + middle) // len(others) > (place * wanted + middle) // len(others)
        ]
        assert len(even) == wanted
        target = sorted(outliers + even)
    source = [i for i in range(N) if i not in target]
    likeness = cosines(signals.keys[0], source, target)
    want = reference.add_neighbours(tokens[0], source, target, likeness, attention, 32, target)
    check(reduce("prumerge-plus", tokens, signals, N - num_kept), signals, target, want)


@transcribes("visionzip")
@pytest.mark.parametrize("share", [10 / 64, 0.5, 1.0])
def test_visionzip(signals: Signals, tokens: Tensor, share: float) -> None:
    contextual_count = round(K * share)
    ranked = reference.place([float(a) for a in signals.cls_attention[0].double()])
    dominant = [i for i in range(N) if ranked[i] < K - contextual_count]
    others = [i for i in range(N) if i not in dominant]
    contextual = others[:: len(others) // contextual_count][:contextual_count]
    target = sorted(dominant + contextual)
    source = [i for i in others if i not in contextual]
    likeness = cosines(signals.keys[0], source, target)
    want = reference.mean_of_nearest(tokens[0], source, target, likeness, contextual)
    check(reduce("visionzip", tokens, signals, R, contextual_share=share), signals, target, want)


@pytest.mark.parametrize(("keep", "dominant"), [(64, 54), (128, 108), (192, 162)])
def test_visionzip_as_its_authors_set_it(keep: int, dominant: int) -> None:
    """54 + 10, 108 + 20 and 162 + 30: the dominant tokens, unchanged, are those that [CLS] attends to most."""
    full, tokens = make_signals(1, 576, grid=(24, 24)), make_tokens(1, 576)
    got = reduce("visionzip", tokens, full, 576 - keep)
    most = full.cls_attention[0].topk(dominant).indices
    kept = torch.isin(got.position[0], full.position[0, most])
    assert kept.sum() == dominant
    assert torch.equal(got.tokens[0, kept], tokens[0, most.sort().values])
    assert got.size[0, ~kept].sum() == 576 - dominant


def farthest(features: Tensor) -> list[int]:
    """DivPrune's picks, ascending."""
    distance = [[1 - reference.cosine(features[i], features[j]) for j in range(N)] for i in range(N)]
    picks = [max(range(N), key=lambda i: min(distance[i][j] for j in range(N) if j != i))]
    while len(picks) < K:
        rest = [i for i in range(N) if i not in picks]
        picks.append(max(rest, key=lambda i: min(distance[i][j] for j in picks)))
    return sorted(picks)


@transcribes("vscan-v")
@pytest.mark.parametrize("window", [(3, 3), (2, 4), (6, 7), (1, 1)])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.0])
def test_vscan_v(signals: Signals, tokens: Tensor, window: tuple[int, int], share: float) -> None:
    rows, columns = signals.grid
    shallow, last = signals.shallow_cls_attention[0].tolist(), signals.cls_attention[0].tolist()
    tops, lefts = range(0, rows, window[0]), range(0, columns, window[1])
    local: list[int] = []
    for top in tops:
        for left in lefts:
            inside = [
                index
                for index, place in enumerate(signals.position[0].tolist())
                if top <= place // columns < top + window[0] and left <= place % columns < left + window[1]
            ]
            best = sorted(inside, key=lambda i: -shallow[i])
            local += best[: int(K * share) // (len(tops) * len(lefts))]
    others = sorted((i for i in range(N) if i not in local), key=lambda i: -last[i])
    target = sorted(local + others[: K - len(local)])
    source = [i for i in range(N) if i not in target]
    want = reference.mean_of_nearest(
        tokens[0], source, target, cosines(signals.features[0], source, target), target
    )
    settings = {"scan_window": window, "local_share": share, "size_weighted": False}
    check(reduce("vscan-v", tokens, signals, R, **settings), signals, target, want)


@transcribes("divprune")
def test_divprune(signals: Signals, tokens: Tensor) -> None:
    target = farthest(signals.features[0])
    check(reduce("divprune", tokens, signals, R), signals, target, tokens[0, target].double())


@transcribes("best")
@pytest.mark.parametrize("epsilon", [0.998, 0.7])
def test_best(signals: Signals, tokens: Tensor, epsilon: float) -> None:
    """DivPrune's choice, the cosines of the keys, Eq. 13."""
    target = farthest(signals.features[0])
    source = [i for i in range(N) if i not in target]
    want, _ = reference.quantile_merge(
        tokens[0],
        torch.ones(N),
        source,
        target,
        cosines(signals.keys[0], source, target),
        epsilon,
    )
    check(reduce("best", tokens, signals, R, epsilon=epsilon), signals, target, want)


@transcribes("cdpruner")
@pytest.mark.parametrize("negate", [True, False])
def test_cdpruner(signals: Signals, tokens: Tensor, negate: bool) -> None:
    """Greedy by the determinant itself, recomputed for every candidate."""
    num_kept = 9  # fewer than the 16 dimensions of the features: determinants well above rounding
    features = torch.nn.functional.normalize(signals.features[0].double(), dim=-1)
    relevance = signals.text_relevance[0].double() * (-1 if negate else 1)
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min() + 1e-6)
    kernel = relevance[:, None] * (features @ features.T) * relevance
    picks: list[int] = []
    for _ in range(num_kept):
        rest = [i for i in range(N) if i not in picks]
        picks.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*picks, i]][:, [*picks, i]]))))
    target = sorted(picks)
    got = reduce("cdpruner", tokens, signals, N - num_kept, negate=negate)
    check(got, signals, target, tokens[0, target].double())


@transcribes("trim")
@pytest.mark.parametrize("negate", [True, False])
def test_trim(signals: Signals, tokens: Tensor, negate: bool) -> None:
    relevance = signals.text_relevance[0] * (-1 if negate else 1)
    target = lowest(relevance)
    source = [i for i in range(N) if i not in target]
    want = torch.stack([*tokens[0, target].double(), tokens[0, source].double().mean(dim=0)])
    check(reduce("trim", tokens, signals, R, negate=negate), signals, target, want)


@transcribes("recoverable")
def test_recoverable(signals: Signals, tokens: Tensor) -> None:
    attention = [float(a) for a in signals.cls_attention[0].double()]
    relevance = [float(r) for r in signals.text_relevance[0].double()]
    num_attended, num_relevant = round(K * 0.5), round(K * 0.3)
    attended = sorted(range(N), key=lambda i: -attention[i])[:num_attended]
    relevant = sorted((i for i in range(N) if i not in attended), key=lambda i: -relevance[i])[:num_relevant]
    rest = [i for i in range(N) if i not in attended and i not in relevant]
    centres = sorted(rest, key=lambda i: -attention[i])[: K - num_attended - num_relevant]
    target = sorted(attended + relevant + centres)
    source = [i for i in range(N) if i not in target]
    likeness = [
        [value + 1.8 * relevance[i] for value in row]
        for i, row in zip(source, cosines(signals.keys[0], source, target), strict=True)
    ]
    want = reference.add_neighbours(tokens[0], source, target, likeness, attention, 10, centres)
    check(reduce("recoverable", tokens, signals, R, num_neighbours=10), signals, target, want)
    all_of_them = reduce("recoverable", tokens, signals, R)  # 32 neighbours are more than the 20 sources
    assert torch.equal(all_of_them.tokens, reduce("recoverable", tokens, signals, R, num_neighbours=R).tokens)
