"""The ops as torch sees them: schemas, fakes, compilation, choice of implementation, imports."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ficoco_vllm import kernels
from ficoco_vllm.kernels import Backend
from ficoco_vllm.kernels.attention_scores import custom
from ficoco_vllm.kernels.backend import uses_triton
from ficoco_vllm.kernels.farthest_points.ops import _farthest_points
from ficoco_vllm.kernels.filter_scores.ops import _filter_scores
from ficoco_vllm.kernels.partition.ops import _partition
from ficoco_vllm.kernels.quantile_merge.ops import _quantile_merge
from tests.kernels.conftest import DEVICE, needs_triton

B, H, N, D = 2, 2, 20, 32


def inputs() -> dict[str, Tensor]:
    """One of each tensor that the ops take."""
    torch.manual_seed(0)
    made = {
        "query": torch.randn(B, H, N, D),
        "key": torch.randn(B, H, N, D),
        "lse": torch.full((B, H, N), 5.0),
        "bias": torch.randn(B, N),
        "weight": torch.rand(B, N),
        "source": torch.tensor([[1, 4, 9], [0, 2, 3]]),
        "target": torch.tensor([[0, 2, 3, 5], [1, 5, 6, 7]]),
        "text": torch.rand(B, 3, N),
        "tokens": torch.randn(B, N, 24),
        "correlation": torch.rand(B, 3, 4),
        "distance": torch.rand(B, N, N),
        "first": torch.tensor([7, 0]),
        "position": torch.arange(N).expand(B, N).contiguous(),
        "length": torch.tensor([N, 11]),
    }
    return {name: value.to(DEVICE) for name, value in made.items()}


def calls(x: dict[str, Tensor]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every custom op with arguments."""
    q, k, lse, bias, weight, length = (x[n] for n in ("query", "key", "lse", "bias", "weight", "length"))
    return {
        "softmax_stats": (custom.softmax_stats, (q, k, 0.2, bias, True, length, None, weight, H)),
        "attention_block": (
            custom.attention_block,
            (q, k, lse, 0.2, x["source"], None, None, True, x["text"], 0.6, H),
        ),
        "attention_sums": (
            custom.attention_sums,
            (q, k, lse, 0.2, bias, False, H),
        ),
        "cls_scores": (custom.cls_scores, (q, k, lse, 0.2, bias, True, H)),
        "filter_scores": (
            _filter_scores,
            (weight, weight, 0.35, x["position"], [4, 5], [2, 2], 2.0),
        ),
        "farthest_points": (_farthest_points, (x["distance"], x["first"], 6)),
        "partition": (_partition, (weight, 5)),
        "quantile_merge": (
            _quantile_merge,
            (x["tokens"], weight, x["correlation"], x["source"], x["target"], 0.9, None, False),
        ),
    }


@pytest.mark.parametrize("name", sorted(calls(inputs())))
def test_opcheck(name: str) -> None:
    needs_triton()
    op, arguments = calls(inputs())[name]
    torch.library.opcheck(op, arguments)


def reduction(backend: Backend) -> Callable[..., Tensor]:
    """All ops in a row, as FiCoCo-V and Eq. 15 use them."""

    def reduce(
        query: Tensor, key: Tensor, tokens: Tensor, size: Tensor, position: Tensor, text: Tensor
    ) -> Tensor:
        lse, row_sum = kernels.softmax_stats(query, key, 0.2, backend=backend)
        _, from_cls, _ = kernels.cls_scores(query, key, lse, 0.2, backend=backend)
        received = kernels.attention_sums(query, key, lse, 0.2, backend=backend)
        redundancy = kernels.filter_scores(
            row_sum + received, from_cls, 0.35, position=position, grid=(4, 5), backend=backend
        )
        source, target = kernels.partition(redundancy, 6, backend=backend)
        correlation = kernels.attention_block(
            query,
            key,
            lse,
            0.2,
            row_index=source,
            column_index=target,
            causal=True,
            text=text,
            gamma=0.6,
            backend=backend,
        )
        merged, _ = kernels.quantile_merge(
            tokens, size, correlation, source, target, epsilon=0.9, backend=backend
        )
        return merged

    return reduce


def test_compiles_into_one_graph(backend: Backend) -> None:
    """A break in the graph, as any look at the data makes one, is an error with `fullgraph`."""
    x = inputs()
    arguments = (x["query"], x["key"], x["tokens"], x["weight"], x["position"], x["text"])
    plain = reduction(backend)(*arguments)
    compiled = torch.compile(reduction(backend), fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled, plain)


def test_both_implementations_agree() -> None:
    needs_triton()
    x = inputs()
    arguments = (x["query"], x["key"], x["tokens"], x["weight"], x["position"], x["text"])
    torch.testing.assert_close(
        reduction("triton")(*arguments), reduction("torch")(*arguments), rtol=1e-4, atol=1e-4
    )


def test_choice_of_implementation() -> None:
    here = torch.zeros(1)
    with FakeTensorMode():
        there = torch.zeros(1, device="cuda")
    assert not uses_triton("auto", here)
    assert uses_triton("auto", there)
    assert uses_triton("triton", here)
    assert not uses_triton("torch", there)
    with pytest.raises(ValueError, match="backend = 'cuda'"):
        uses_triton("cuda", here)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # any import of it raises
import torch
from ficoco_vllm import kernels
query = torch.randn(1, 2, 9, 32)
lse, _ = kernels.softmax_stats(query, query, 0.2)
assert kernels.attention_block(query, query, lse, 0.2).sum(-1).allclose(torch.ones(1, 9))
try:
    kernels.partition(torch.randn(1, 9), 3, backend="triton")
except ImportError:
    pass
else:
    raise SystemExit("Triton was requested by name, but something else ran")
others = ("vllm", "ficoco_vllm.reduction")
assert not any(name in sys.modules for name in others), others
"""


def test_without_triton() -> None:
    """Without Triton the package imports, runs with torch, and refuses Triton requested by name."""
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)
