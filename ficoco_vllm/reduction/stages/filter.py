"""Filters by attention; tokens with higher redundancy leave first."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from torch import Tensor

from ficoco_vllm.kernels import Backend, filter_scores
from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Signals, attention_map, require
from ficoco_vllm.reduction.stage import Filter


def _square(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


Side = Annotated[int, Field(ge=1)]
Window = Annotated[tuple[Side, Side], BeforeValidator(_square)]


class LocalPenalty(Settings):
    """Settings of the local penalty.

    Attributes:
        window: rows and columns of a window; one number means a square.
        coefficient: factor of the highest score of a window (divisor, if that score is negative).
    """

    window: Window = (2, 2)
    coefficient: float = Field(default=2.0, ge=1.0)


class LocalTask(LocalPenalty):
    """Settings of Eq. 11.

    Attributes:
        lam: weight of the local redundancy against the task redundancy (lambda).
        local_redundancy: count the attention that a patch pays to the other patches: the more, the more redundant.
        task_redundancy: count the attention of [CLS] to a patch: the more, the less redundant.
        local_penalty: raise the highest score of each window, which spreads the removed patches over the image.
    """

    lam: float = Field(default=0.35, ge=0.0, le=1.0)
    local_redundancy: bool = True
    task_redundancy: bool = True
    local_penalty: bool = True


def local_task_signals(settings: LocalTask) -> frozenset[str]:
    """Signals that Eq. 11 reads under these settings."""
    used = {"visual_attention": settings.local_redundancy, "cls_attention": settings.task_redundancy}
    return frozenset(name for name, on in used.items() if on)


def local_task(signals: Signals, settings: LocalTask, backend: Backend = "torch") -> Tensor:
    """s_i = lam / N * sum_j A_ij - (1 - lam) * a_i^CLS, then the local penalty.

    Windows of the penalty lie on the original grid; tokens that left earlier are blanks, fused tokens (position -1)
    are in no window.

    Computed in fp64: where [CLS] attends to a few tokens only, the row sums of the others differ from 1 in the seventh
    digit, and the scores of hundreds of tokens, also at the cut, differ by less than fp32 resolves.

    Args:
        signals: `visual_attention` (B, N, N) and `cls_attention` (B, N).
        settings: see `LocalTask`.
        backend: implementation of the fused op.

    Returns:
        (B, N) fp64 redundancy.

    Source: arXiv:2411.17686, Eq. 11.
    """
    return filter_scores(
        attention_map(signals).row_sum() if settings.local_redundancy else None,
        require(signals, "cls_attention") if settings.task_redundancy else None,
        settings.lam,
        position=signals.position,
        grid=signals.grid,
        window=settings.window if settings.local_penalty else None,
        coefficient=settings.coefficient,
        backend=backend,
    )


def cls_attention(signals: Signals, settings: Settings) -> Tensor:
    """s_i = -a_i^CLS: tokens with the least [CLS] attention leave first.

    Args:
        signals: `cls_attention` (B, N).
        settings: none.

    Returns:
        (B, N) fp32 redundancy.

    Source: arXiv:2411.17686, Eq. 4.
    """
    return -require(signals, "cls_attention").float()


STAGES = (
    Filter(local_task, local_task_signals, LocalTask),
    Filter(cls_attention, frozenset({"cls_attention"})),
)
