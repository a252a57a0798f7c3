"""Eqs. 11 and 14 with the local penalty, against plain loops and against the reduction's own stages."""

import pytest
import torch
from torch import Tensor

from ficoco_vllm.kernels import Backend, filter_scores
from ficoco_vllm.kernels.filter_scores import reference
from ficoco_vllm.reduction import Signals
from ficoco_vllm.reduction.stages.filter import LocalTask, local_task
from ficoco_vllm.reduction.stages.text_filter import LocalText, local_text
from tests.kernels.conftest import DEVICE

# Two products, a sum and the penalty, each rounded once in fp64, on values of about 1.
ATOL = 8 * 2**-52


def places(B: int, N: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Positions (B, N) of tokens still alive; the last one has none if there are several."""
    generator = torch.Generator().manual_seed(seed)
    cells = grid[0] * grid[1]
    alive = torch.stack([torch.randperm(cells, generator=generator)[:N].sort().values for _ in range(B)])
    if N > 1:
        alive[:, -1] = -1
    return alive


def signals(B: int, N: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Row sums and task scores with equal entries among them, of both signs when mixed."""
    generator = torch.Generator().manual_seed(seed)
    row_sum = torch.rand((B, N), generator=generator) * N
    task = torch.rand((B, N), generator=generator)
    row_sum[:, 1::3], task[:, 1::3] = N / 2, 0.25
    row_sum[:, 2::7] = 0.0
    return row_sum, task


def run(
    backend: Backend, row_sum: Tensor | None, task: Tensor | None, weight: float, **settings: object
) -> Tensor:
    """The op where the kernels run, back on the CPU."""
    there = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in settings.items()}
    first, second = (None if x is None else x.to(DEVICE) for x in (row_sum, task))
    return filter_scores(first, second, weight, backend=backend, **there).cpu()


@pytest.mark.parametrize(
    ("N", "grid", "weight"),
    [
        (1, (1, 1), 0.35),
        (2, (1, 7), 1.0),
        (63, (9, 8), 0.35),
        (64, (8, 8), 0.0),
        (64, (8, 8), 0.35),
        (576, (24, 24), 0.35),
    ],
)
@pytest.mark.parametrize("window", [None, (2, 2), (3, 5), (1, 1)])
def test_against_loops(
    N: int, grid: tuple[int, int], weight: float, window: tuple[int, int] | None, backend: Backend
) -> None:
    B = 1 if N > 500 else 2
    position, (row_sum, task) = places(B, N, grid), signals(B, N)
    scores = run(backend, row_sum, task, weight, position=position, grid=grid, window=window, coefficient=3.0)
    expected = reference.filter_scores(row_sum, task, weight, position, grid, window, 3.0)
    torch.testing.assert_close(scores, expected, rtol=ATOL, atol=ATOL)


@pytest.mark.parametrize("which", ["row_sum", "task", "neither"])
def test_terms_left_out(which: str, backend: Backend) -> None:
    position, (row_sum, task) = places(2, 30, (6, 6)), signals(2, 30)
    first, second = row_sum if which == "row_sum" else None, task if which == "task" else None
    scores = run(backend, first, second, 0.35, position=position, grid=(6, 6))
    expected = reference.filter_scores(first, second, 0.35, position, (6, 6), (2, 2), 2.0)
    torch.testing.assert_close(scores, expected, rtol=ATOL, atol=ATOL)


def test_as_the_stages_have_it(backend: Backend) -> None:
    B, N, M, grid = 2, 50, 6, (8, 8)
    generator = torch.Generator().manual_seed(3)
    attention = torch.softmax(2 * torch.randn((B, N + 1, N + 1), generator=generator), dim=-1)
    text = torch.softmax(torch.randn((B, M, N), generator=generator), dim=-1)
    given = Signals(
        visual_attention=attention[:, 1:, 1:],
        cls_attention=attention[:, 0, 1:],
        text_attention=text,
        position=places(B, N, grid),
        grid=grid,
    )
    row_sum = attention[:, 1:, 1:].sum(-1, dtype=torch.float64)
    common = {"position": given.position, "grid": grid}
    vision = run(backend, row_sum, attention[:, 0, 1:], 0.35, **common)
    torch.testing.assert_close(vision, local_task(given, LocalTask()), rtol=ATOL, atol=ATOL)
    decoder = run(backend, row_sum, text.sum(1), 0.6, window=None, **common)
    torch.testing.assert_close(decoder, local_text(given, LocalText()), rtol=ATOL, atol=ATOL * M)


def test_a_coefficient_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"coefficient = 0\.5"):
        filter_scores(
            None, None, 0.5, position=torch.zeros((1, 1), dtype=torch.int64), grid=(1, 1), coefficient=0.5
        )
