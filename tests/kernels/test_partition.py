"""The partition against plain Python, exactly."""

import pytest
import torch
from torch import Tensor

from ficoco_vllm.kernels import Backend, partition
from ficoco_vllm.kernels.partition import reference
from tests.kernels.conftest import DEVICE


def scores(kind: str, B: int, N: int) -> Tensor:
    """Redundancies (B, N), fp32 unless the kind says fp64."""
    if kind.startswith("fp64 "):
        if kind == "fp64 nearly equal":  # equal in fp32
            order = torch.stack(
                [torch.randperm(N, generator=torch.Generator().manual_seed(b)) for b in range(B)]
            )
            return -1.0 - order.double() * 1e-13
        return scores(kind.removeprefix("fp64 "), B, N).double() * 1e30
    generator = torch.Generator().manual_seed(N)
    values = torch.randn((B, N), generator=generator)
    if kind == "ties":
        return values.round()
    if kind == "equal":
        return torch.zeros((B, N))
    if kind == "signed zeros":
        return torch.where(values > 0, 0.0, -0.0)
    if kind == "protected":
        return torch.where(values > 0, values, -torch.inf)
    if kind == "extreme":
        return torch.where(values > 0.5, torch.inf, values * 1e38)
    return values


KINDS = ["random", "ties", "equal", "signed zeros", "protected", "extreme"]


@pytest.mark.parametrize("kind", [*KINDS, "fp64 nearly equal", *(f"fp64 {kind}" for kind in KINDS)])
@pytest.mark.parametrize("N", [1, 2, 63, 576])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_against_plain_python(kind: str, N: int, share: float, backend: Backend) -> None:
    values, num_removed = scores(kind, 2, N), round(share * N)
    source, target = partition(values.to(DEVICE), num_removed, backend=backend)
    expected = reference.partition(values, num_removed)
    assert torch.equal(source.cpu(), expected[0])
    assert torch.equal(target.cpu(), expected[1])


def test_nan_is_the_most_redundant(backend: Backend) -> None:
    values = torch.tensor([[0.0, torch.nan, torch.inf, -torch.nan, 1.0]])
    source, _ = partition(values.to(DEVICE), 2, backend=backend)
    assert source.tolist() == [[1, 3]]


def test_what_cannot_be_is_refused() -> None:
    values = torch.zeros((1, 4))
    with pytest.raises(ValueError, match="num_removed = 5"):
        partition(values, 5)
