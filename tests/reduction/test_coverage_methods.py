"""SCOPE and TOPS against plain float64 transcriptions, one image and one token at a time."""

import pytest
import torch

from ficoco_vllm.reduction import Signals, reduce
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.reduction.testing import make_signals, make_tokens
from tests.reduction import reference
from tests.reduction.transcription import transcribes

N, R, M = 40, 25, 5


def gain(likeness: list[list[float]], picks: list[int], i: int, least: float) -> float:
    """Coverage gain of token i; `least` is the coverage of a token without any pick."""
    rest = [j for j in range(N) if j not in picks]
    return sum(max(0.0, likeness[i][j] - max([least, *(likeness[j][k] for k in picks)])) for j in rest)


def likenesses(signals: Signals) -> list[list[float]]:
    features = signals.features[0]
    return [[reference.cosine(features[i], features[j]) for j in range(N)] for i in range(N)]


def check(name: str, signals: Signals, picks: list[int], **settings: float) -> None:
    tokens = make_tokens(1, N)
    got = reduce(name, tokens, signals, R, **settings)
    kept = sorted(picks)
    assert got.position[0].tolist() == signals.position[0, kept].tolist()
    torch.testing.assert_close(got.tokens[0], tokens[0, kept], rtol=0, atol=0)


@transcribes("scope")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("saliency", [1.0, 0.3, 2.5])  # at zero, pairs of tokens gain exactly the same
def test_scope(seed: int, saliency: float) -> None:
    signals = make_signals(1, N, seed=seed, grid=(6, 7))
    likeness, attention = likenesses(signals), signals.cls_attention[0].double().tolist()
    picks: list[int] = []
    while len(picks) < N - R:
        rest = [i for i in range(N) if i not in picks]
        picks.append(max(rest, key=lambda i: attention[i] ** saliency * gain(likeness, picks, i, 0.0)))
    check("scope", signals, picks, saliency=saliency)


def preservation_set(signals: Signals, relevance: list[float], alpha: float, lam: float) -> list[int]:
    """Algorithms 1 and 2, from the first pick to the last."""
    likeness = likenesses(signals)
    picks = [max(range(N), key=lambda i: relevance[i])]
    while len(picks) < N - R:
        rest = [i for i in range(N) if i not in picks]
        distance = {i: 1 - max(likeness[i][k] for k in picks) for i in rest}
        coverage = {i: gain(likeness, picks, i, -1.0) for i in rest}
        means = [sum(term[i] for i in rest) / len(rest) for term in (relevance, distance, coverage)]
        score = {
            i: relevance[i] / means[0] + alpha * distance[i] / means[1] + lam * coverage[i] / means[2]
            for i in rest
        }
        picks.append(max(rest, key=lambda i: score[i]))
    return picks


@transcribes("tops-v")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("alpha", "lam"), [(0.5, 0.5), (0.0, 1.0), (3.0, 0.0)])
def test_tops_v(seed: int, alpha: float, lam: float) -> None:
    signals = make_signals(1, N, seed=seed, grid=(6, 7))
    picks = preservation_set(signals, signals.cls_attention[0].double().tolist(), alpha, lam)
    check("tops-v", signals, picks, diversity=alpha, coverage=lam)


@transcribes("tops-l")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tops_l(seed: int) -> None:
    signals = make_signals(1, N, seed=seed, M=M, grid=(6, 7))
    visual, text = signals.features[0].double(), signals.text_features[0].double()
    alike = (visual @ text.T).softmax(dim=-1).mean(dim=0)
    raters = [k for k in range(M) if alike[k] > alike.mean()]
    relevance = signals.text_attention[0, raters].double().mean(dim=0).tolist()
    check("tops-l", signals, preservation_set(signals, relevance, 0.5, 0.5))


@pytest.mark.parametrize("name", ["scope", "tops-v"])
def test_equal_tokens_leave_in_order(name: str) -> None:
    """Nothing is gained once one of them is kept, and no mean is divided by."""
    signals = make_signals(1, 6, seed=0, grid=(2, 3))
    same = Signals(
        cls_attention=torch.full((1, 6), 0.125),
        features=torch.ones(1, 6, 4),
        position=signals.position,
        grid=signals.grid,
    )
    assert reduce(name, torch.ones(1, 6, 4), same, 3).position[0].tolist() == signals.position[0, :3].tolist()


@pytest.mark.parametrize(("name", "middle", "final"), [("tops", 128, 16), ("vscan", 96, 32)])
def test_tokens_between_the_stages(name: str, middle: int, final: int) -> None:
    """Table 9 of TOPS at a budget of 64; the scripts of VScan's authors."""
    pipeline = PIPELINES[name]
    assert pipeline.encoder_keep(576, final) == middle
    assert pipeline.encoder_keep(576, 576) == 576
