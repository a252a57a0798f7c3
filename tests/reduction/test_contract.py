"""The contract of every registered method, and further tests of the built-in ones."""

from dataclasses import replace
from typing import Any

import numpy as np
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


@pytest.mark.parametrize("num_removed", [np.int64(4), torch.tensor(4)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64])
def test_integers_and_sizes_of_every_kind(num_removed: Any, dtype: torch.dtype) -> None:
    signals, tokens = make_signals(2, 9), make_tokens(2, 9)
    got = reduce("tome", tokens, signals, num_removed, torch.ones(2, 9, dtype=dtype))
    for one, other in zip(got, reduce("tome", tokens, signals, 4), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_removed": 2.0}, r"num_removed = 2.0 is not allowed; allowed: an integer"),
        ({"num_removed": torch.tensor([1, 2])}, "num_removed = tensor.* is not allowed; allowed: an integer"),
        ({"num_removed": None}, "num_removed = None is not allowed"),
        (
            {"tokens": make_tokens(2, 9).long()},
            "tokens have the dtype torch.int64; allowed: a floating dtype",
        ),
        ({"tokens": make_tokens(2, 9).numpy()}, "tokens is of type ndarray; allowed: a tensor"),
        ({"size": [1.0] * 9}, "size is of type list; allowed: a tensor"),
        ({"size": torch.ones(2, 8)}, r"size has shape \(2, 8\)"),
        ({"position": torch.zeros(2, 9)}, "position has the dtype torch.float32; allowed: an integer dtype"),
        (
            {"cls_attention": torch.ones(2, 9, dtype=torch.int64)},
            "cls_attention has the dtype torch.int64; allowed: a floating dtype",
        ),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(changed: dict[str, Any], words: str) -> None:
    fields = {name: value for name, value in changed.items() if hasattr(Signals, name) or name == "position"}
    signals = replace(make_signals(2, 9), **fields)
    given: dict[str, Any] = {"tokens": make_tokens(2, 9), "num_removed": 2}
    given |= {name: value for name, value in changed.items() if name not in fields}
    with pytest.raises(ValueError, match=words):
        reduce("ficoco-v", signals=signals, **given)
