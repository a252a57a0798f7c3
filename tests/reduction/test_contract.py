"""The contract of every registered method, and further tests of the built-in ones."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ficoco_vllm.reduction import Method, Signals, available, get, partition, reduce
from ficoco_vllm.reduction.testing import LazyMap, MethodContract, make_signals, make_tokens

NAMES = available()


class TestContract(MethodContract):
    @pytest.fixture(params=NAMES)
    def checked(self, request: pytest.FixtureRequest) -> Method:
        return get(request.param)


@pytest.mark.parametrize(
    "name", ["ficoco-v", "ficoco-l", "tome", "evit", "prumerge-plus", "spatial-pool", "visionzip"]
)
def test_compiles_into_one_graph(name: str) -> None:
    signals, tokens = make_signals(2, 20), make_tokens(2, 20)
    reducer = get(name).configure()

    def run(tokens: Tensor, signals: Signals) -> tuple[Tensor, ...]:
        return tuple(reducer(tokens, signals, 6))

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for got, want in zip(compiled(tokens, signals), run(tokens, signals), strict=True):
        assert torch.equal(got, want)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    B=st.integers(1, 3),
    N=st.integers(2, 40),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_shape(name: str, B: int, N: int, share: float, seed: int) -> None:
    method = get(name)
    R = round(share * method.max_removed(N))
    signals, tokens = make_signals(B, N, seed=seed), make_tokens(B, N, seed=seed)
    got = reduce(method, tokens, signals, R)
    K = N - R
    assert got.tokens.shape[1] == K + (method.num_extra if R else 0)
    assert got.tokens.isfinite().all()
    assert (got.position[:, :K].diff(dim=1) > 0).all()
    if method.merges:
        torch.testing.assert_close(got.size.sum(1), torch.full((B,), float(N)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["ficoco-v", "ficoco-l"])
def test_ficoco_reads_row_sums_and_blocks_alone(name: str) -> None:
    signals, tokens = make_signals(2, 30), make_tokens(2, 30)
    lazy = LazyMap(signals.visual_attention)
    reduce(name, tokens, replace(signals, visual_attention=lazy), 10)
    assert lazy.calls == {"row_sum", "block"}


def test_ties_leave_in_index_order() -> None:
    source, target = partition(torch.tensor([[1.0, 0.0, 1.0, 2.0, 1.0, -torch.inf]]), 3)
    assert source.tolist() == [[0, 2, 3]]
    assert target.tolist() == [[1, 4, 5]]
    source, _ = partition(torch.zeros(2, 577), 100)
    assert torch.equal(source, torch.arange(100).expand(2, 100))


def test_a_shape_that_does_not_fit_is_named() -> None:
    signals, tokens = make_signals(2, 9), make_tokens(2, 9)
    short = replace(signals, cls_attention=signals.cls_attention[:, 1:])
    with pytest.raises(ValueError, match=r"cls_attention has shape \(2, 8\)"):
        reduce("ficoco-v", tokens, short, 2)
