"""Eq. 13 against plain loops in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ficoco_vllm.kernels import Backend, quantile_merge
from ficoco_vllm.kernels.quantile_merge import eager, reference
from tests.kernels.conftest import DEVICE

HALF = torch.float16
BFLOAT = torch.bfloat16
SINGLE = torch.float32
# The result is rounded once to its type; single precision also sums up to 550 products.
ATOL = {HALF: 2**-9, BFLOAT: 2**-6, SINGLE: 2**-17}


@dataclass(frozen=True)
class Problem:
    """Arguments of one merge, on the CPU."""

    tokens: Tensor
    size: Tensor
    correlation: Tensor
    source: Tensor
    target: Tensor

    def run(self, backend: Backend, **settings: object) -> tuple[Tensor, Tensor]:
        """The op where the kernels run, back on the CPU."""
        parts = (self.tokens, self.size, self.correlation, self.source, self.target)
        tokens, size = quantile_merge(*(part.to(DEVICE) for part in parts), backend=backend, **settings)
        return tokens.cpu(), size.cpu()


def problem(R: int, K: int, D: int = 24, dtype: torch.dtype = SINGLE, B: int = 2) -> Problem:
    """R sources and K targets, spread at random; the correlation has rows of every awkward kind."""
    generator = torch.Generator().manual_seed(R * 1000 + K)
    N = R + K + 1
    order = torch.stack([torch.randperm(N, generator=generator) for _ in range(B)])
    source, target = order[:, :R].sort().values, order[:, R : R + K].sort().values
    correlation = torch.rand((B, R, K), generator=generator) ** 4
    kinds = [
        lambda row: row,
        torch.zeros_like,
        lambda row: torch.full_like(row, 0.125),
        lambda row: (row * 4).round(),
        lambda row: -row,
        lambda row: row - 0.1,
        lambda row: torch.where(row > 0.1, row, -torch.inf),
        lambda row: row * 1e36,
        lambda row: torch.where(row > 0.3, 0.0, -0.0),
    ]
    for i in range(R):
        correlation[:, i] = kinds[i % len(kinds)](correlation[:, i])
    tokens = torch.randn((B, N, D), generator=generator).to(dtype)
    size = torch.randint(1, 5, (B, N), generator=generator).float()
    return Problem(tokens, size, correlation, source, target)


def check(
    made: Problem,
    backend: Backend,
    epsilon: float = 0.998,
    fixed_k: int | None = None,
    average: bool = False,
) -> None:
    tokens, size = made.run(backend, epsilon=epsilon, fixed_k=fixed_k, average=average)
    parts = (made.tokens, made.size, made.correlation, made.source, made.target)
    expected = reference.quantile_merge(*parts, epsilon, fixed_k, average)
    atol = ATOL[made.tokens.dtype]
    assert tokens.dtype == made.tokens.dtype
    torch.testing.assert_close(tokens.double(), expected[0], rtol=atol, atol=atol)
    torch.testing.assert_close(size.double(), expected[1], rtol=2**-18, atol=2**-18)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 0.998, 1.0])
@pytest.mark.parametrize(("R", "K"), [(0, 5), (1, 1), (9, 1), (18, 2), (20, 63), (37, 64), (9, 130)])
def test_epsilon_and_shape(R: int, K: int, epsilon: float, backend: Backend) -> None:
    check(problem(R, K), backend, epsilon=epsilon)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("average", [False, True])
def test_half_precision(dtype: torch.dtype, average: bool, backend: Backend) -> None:
    check(problem(20, 40, D=40, dtype=dtype), backend, epsilon=0.9, average=average)


@pytest.mark.parametrize("fixed_k", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("average", [False, True])
def test_fixed_k(fixed_k: int, average: bool, backend: Backend) -> None:
    check(problem(20, 33), backend, fixed_k=fixed_k, average=average)


@pytest.mark.parametrize("epsilon", [0.3, 0.998])
def test_average(epsilon: float, backend: Backend) -> None:
    check(problem(20, 33), backend, epsilon=epsilon, average=True)


def test_the_first_reduction_of_the_tower(backend: Backend) -> None:
    check(problem(42, 534, D=64, dtype=HALF, B=1), backend)


@pytest.mark.parametrize("dtype", [SINGLE, BFLOAT])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 0.998, 1.0])
@pytest.mark.parametrize(("R", "K"), [(0, 5), (1, 1), (9, 1), (18, 2), (20, 63), (9, 130)])
def test_only_targets_that_receive_something_are_summed(
    R: int, K: int, epsilon: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of large products on a CPU, on small ones."""
    monkeypatch.setattr(eager, "_MANY_PRODUCTS", 0)
    made = problem(R, K, dtype=dtype)
    check(made, "torch", epsilon=epsilon)
    tokens, size = made.run("torch", epsilon=epsilon)
    before = made.tokens[torch.arange(2)[:, None], made.target]
    alone = size == made.size.gather(1, made.target)
    assert torch.equal(tokens[alone], before[alone])


def test_an_item_does_not_depend_on_its_neighbours(backend: Backend) -> None:
    made = problem(20, 33, B=3)
    together = made.run(backend, epsilon=0.9)
    again = made.run(backend, epsilon=0.9)
    alone = Problem(*(part[1:2] for part in vars(made).values())).run(backend, epsilon=0.9)
    for all_of_them, repeated, single in zip(together, again, alone, strict=True):
        assert torch.equal(all_of_them, repeated)
        torch.testing.assert_close(all_of_them[1:2], single, rtol=0, atol=0 if backend == "triton" else 1e-6)


def test_what_does_not_fit_is_refused() -> None:
    made = problem(3, 4)
    with pytest.raises(ValueError, match=r"epsilon = 1\.5"):
        made.run("torch", epsilon=1.5)
    with pytest.raises(ValueError, match="fixed_k = -1"):
        made.run("torch", epsilon=0.9, fixed_k=-1)
    with pytest.raises(ValueError, match=r"correlation has shape \(2, 2, 4\); needed: \(2, 3, 4\)"):
        replace(made, correlation=made.correlation[:, 1:]).run("torch", epsilon=0.9)
