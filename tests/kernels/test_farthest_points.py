"""The farthest points against plain loops, exactly."""

import pytest
import torch
from torch import Tensor

from ficoco_vllm.kernels import Backend, farthest_points
from ficoco_vllm.kernels.farthest_points import reference
from tests.kernels.conftest import DEVICE


def distances(kind: str, B: int, N: int) -> Tensor:
    """(B, N, N); the ties of rounded and equal distances decide which pick is the first of its equals."""
    generator = torch.Generator().manual_seed(N)
    features = torch.nn.functional.normalize(torch.randn((B, N, 8), generator=generator), dim=-1)
    distance = 1.0 - features @ features.transpose(1, 2)
    if kind == "rounded":
        return (4 * distance).round()
    if kind == "equal":
        return torch.ones((B, N, N))
    if kind == "transposed":
        return distance.transpose(1, 2)
    return distance


@pytest.mark.parametrize("kind", ["random", "rounded", "equal", "transposed"])
@pytest.mark.parametrize("N", [1, 2, 63, 150])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_against_plain_loops(kind: str, N: int, share: float, backend: Backend) -> None:
    distance, num_kept = distances(kind, 2, N), max(1, round(share * N))
    first = torch.tensor([N - 1, N // 2])
    redundancy = farthest_points(distance.to(DEVICE), first.to(DEVICE), num_kept, backend=backend)
    expected = reference.farthest_points(distance, first, num_kept)
    assert expected.sum() == 2 * (N - num_kept)
    assert torch.equal(redundancy.cpu(), expected)


def test_a_batch_changes_nothing(backend: Backend) -> None:
    distance, first = distances("rounded", 3, 63).to(DEVICE), torch.tensor([5, 0, 62], device=DEVICE)
    together = farthest_points(distance, first, 20, backend=backend)
    for item in range(3):
        alone = farthest_points(distance[item : item + 1], first[item : item + 1], 20, backend=backend)
        assert torch.equal(together[item : item + 1], alone)


@pytest.mark.parametrize("num_kept", [0, 5])
def test_what_cannot_be_is_refused(num_kept: int) -> None:
    distance, first = torch.zeros((1, 4, 4)), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"num_kept = {num_kept}"):
        farthest_points(distance, first, num_kept)
    with pytest.raises(ValueError, match=r"first \(2,\)"):
        farthest_points(distance, first.expand(2), 1)
