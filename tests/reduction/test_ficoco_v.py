"""FiCoCo-V against a plain float64 transcription of Eqs. 11-13, its ablations, and the local penalty."""

import pytest
import torch

from ficoco_vllm.kernels import filter_scores
from ficoco_vllm.kernels.quantile_merge import row_quantile
from ficoco_vllm.reduction import Signals, get, reduce
from ficoco_vllm.reduction.testing import make_signals, make_tokens
from tests.reduction import reference
from tests.reduction.transcription import transcribes

ABLATIONS = [
    {},
    {"local_redundancy": False},
    {"task_redundancy": False},
    {"local_penalty": False},
    {"fixed_k": 0},
    {"fixed_k": 1},
    {"fixed_k": 2},
    {"average": True},
    {"average": True, "epsilon": 0.8},
    {"epsilon": 0.9},
    {"lam": 0.8, "coefficient": 4.0, "window": (3, 2)},
]


@transcribes("ficoco-v")
@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
def test_equations(settings: dict) -> None:
    B, N, R = 2, 30, 9
    signals, tokens = make_signals(B, N, grid=(6, 7)), make_tokens(B, N)
    size = torch.rand(B, N) + 1
    got = reduce("ficoco-v", tokens, signals, R, size, **settings)
    for b in range(B):
        scores = reference.local_task(
            signals.visual_attention[b].double(),
            signals.cls_attention[b].double(),
            settings.get("lam", 0.35),
            settings.get("local_redundancy", True),
            settings.get("task_redundancy", True),
        )
        position = signals.position[b].tolist()
        if settings.get("local_penalty", True):
            window, coefficient = settings.get("window", (2, 2)), settings.get("coefficient", 2.0)
            scores = reference.local_penalty(scores, position, signals.grid, window, coefficient)
        source, target = reference.split(scores, R)
        correlation = [[float(signals.visual_attention[b, i, j]) for j in target] for i in source]
        keep = {key: settings[key] for key in ("epsilon", "fixed_k", "average") if key in settings}
        want, mass = reference.quantile_merge(tokens[b], size[b], source, target, correlation, **keep)
        assert got.position[b].tolist() == [position[j] for j in target]
        torch.testing.assert_close(got.tokens[b].double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.size[b], mass, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.25, 0.5, 0.9, 0.998, 1.0])
@pytest.mark.parametrize("K", [1, 2, 3, 101, 501])
def test_row_quantile(epsilon: float, K: int) -> None:
    values = torch.randn(3, K, generator=torch.Generator().manual_seed(K))
    want = [[reference.quantile(row.tolist(), epsilon)] for row in values.double()]
    got = row_quantile(values, epsilon).double()
    torch.testing.assert_close(got, torch.tensor(want).double(), rtol=0, atol=1e-6)


def test_penalty_first_of_equals_and_fused_tokens() -> None:
    position = torch.tensor([[0, 1, 4, 5, 2, -1, -1]])
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, -4.0, 9.0, -9.0]])
    # Window 0 holds 0, 1, 4, 5: of the two maxima only the first is enhanced. 2 is alone in window 1.
    want = torch.tensor([[1.0, 6.0, 3.0, 2.0, -2.0, 9.0, -9.0]])
    result = filter_scores(None, -scores, 0.0, position=position, grid=(4, 4))
    assert torch.equal(result, want.double())


def test_zero_sum_rows_drop_information_and_size() -> None:
    signals = make_signals(1, 6, grid=(2, 3))
    attention = torch.zeros(1, 6, 6)
    attention[0, 0, 1] = 0.5  # of the two sources only token 0 points anywhere
    cls = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    signals = Signals(
        visual_attention=attention, cls_attention=cls, position=signals.position, grid=signals.grid
    )
    tokens = make_tokens(1, 6)
    got = reduce("ficoco-v", tokens, signals, 2, local_penalty=False)
    assert got.size.tolist() == [[2.0, 1.0, 1.0, 1.0]]
    torch.testing.assert_close(got.tokens[0, 0], (tokens[0, 0] + tokens[0, 1]) / 2)
    assert torch.equal(got.tokens[0, 1:], tokens[0, [2, 4, 5]])


def test_defaults_are_the_papers() -> None:
    settings = get("ficoco-v").configure().settings.model_dump()
    expected = {"lam": 0.35, "epsilon": 0.998, "coefficient": 2.0, "window": (2, 2), "fixed_k": None}
    assert {key: settings[key] for key in expected} == expected


def test_coefficient_one_is_no_penalty() -> None:
    signals, tokens = make_signals(1, 20, grid=(5, 4)), make_tokens(1, 20)
    off = reduce("ficoco-v", tokens, signals, 6, local_penalty=False)
    neutral = reduce("ficoco-v", tokens, signals, 6, coefficient=1.0)
    assert torch.equal(off.tokens, neutral.tokens)
