"""Filters that read the text: tokens that the question does not need leave first."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ficoco_vllm.kernels import Backend, filter_scores
from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Signals, attention_map, require
from ficoco_vllm.reduction.stage import Filter
from ficoco_vllm.reduction.stages.filter import LocalPenalty


class LocalText(LocalPenalty):
    """Settings of Eq. 14.

    Attributes:
        beta: weight of the local redundancy against the task redundancy.
        local_redundancy: count the attention that a patch pays to the other patches: the more, the more redundant.
        task_redundancy: count the attention of the text to a patch: the more, the less redundant.
        local_penalty: raise the highest score of each window, which spreads the removed patches over the image; the
            paper leaves that out in the decoder.
    """

    beta: float = Field(default=0.6, ge=0.0, le=1.0)
    local_redundancy: bool = True
    task_redundancy: bool = True
    local_penalty: bool = False


def local_text_signals(settings: LocalText) -> frozenset[str]:
    """Signals that Eq. 14 reads under these settings."""
    used = {"visual_attention": settings.local_redundancy, "text_attention": settings.task_redundancy}
    return frozenset(name for name, on in used.items() if on)


def local_text(signals: Signals, settings: LocalText, backend: Backend = "torch") -> Tensor:
    """s_i = beta / N * sum_j A_ij - (1 - beta) * sum_k A_ki, with k over the text tokens.

    The second term is the attention that token i receives from the text. The paper writes A_ik, but in a causal
    decoder the visual tokens come first and attend to no text.

    Args:
        signals: `visual_attention` (B, N, N) and `text_attention` (B, M, N).
        settings: see `LocalText`.
        backend: implementation of the fused op.

    Returns:
        (B, N) fp64 redundancy.

    Source: arXiv:2411.17686, Eq. 14.
    """
    received = None
    if settings.task_redundancy:
        received = require(signals, "text_attention").sum(dim=1, dtype=torch.float32)
    return filter_scores(
        attention_map(signals).row_sum() if settings.local_redundancy else None,
        received,
        settings.beta,
        position=signals.position,
        grid=signals.grid,
        window=settings.window if settings.local_penalty else None,
        coefficient=settings.coefficient,
        backend=backend,
    )


class Received(Settings):
    """Settings of Eq. 5.

    Attributes:
        queries: tokens whose attention counts: "last" for the last prompt token, "all" for all tokens.
    """

    queries: Literal["last", "all"] = "last"


def received_signals(settings: Received) -> frozenset[str]:
    """Signals that Eq. 5 reads under these settings."""
    return frozenset({"text_attention", *({"visual_attention"} if settings.queries == "all" else ())})


def received_attention(signals: Signals, settings: Received) -> Tensor:
    """s_i = minus the attention that token i receives.

    Args:
        signals: `text_attention` (B, M, N); for `queries="all"` also `visual_attention` (B, N, N).
        settings: see `Received`.

    Returns:
        (B, N) fp32 redundancy.

    Source: arXiv:2411.17686, Eq. 5; arXiv:2403.06764, Sec. 4.
    """
    text = require(signals, "text_attention")
    if settings.queries == "last":
        return -text[:, -1].float()
    visual = attention_map(signals).column_sum()
    return -(visual + text.sum(dim=1, dtype=torch.float32))


def self_cross(signals: Signals, settings: Settings) -> Tensor:
    """s_i = -(sum_j A_ji / N) * sum_k A_ki: attention received from the image times attention received from the text.

    Args:
        signals: `visual_attention` (B, N, N) and `text_attention` (B, M, N).
        settings: none.

    Returns:
        (B, N) fp32 redundancy.

    Source: arXiv:2409.10197, Sec. 3.
    """
    visual = attention_map(signals).column_sum() / signals.position.shape[1]
    return -visual * require(signals, "text_attention").sum(dim=1, dtype=torch.float32)


class Relevance(Settings):
    """Settings of stages that read `text_relevance`.

    Attributes:
        negate: take the negated relevance. CLIP's patch tokens are most similar to a text where the image does not
            show it, so the released codes of TRIM and CDPruner negate a plain cosine of CLIP. A server without a text
            encoder, which compares the language model's embeddings, does not, unless it is told to.
    """

    negate: bool = True


def text_relevance(signals: Signals, settings: Relevance) -> Tensor:
    """s_i = minus the relevance of token i for the text.

    Args:
        signals: `text_relevance` (B, N).
        settings: see `Relevance`.

    Returns:
        (B, N) fp32 redundancy.

    Source: arXiv:2409.10994, Sec. 3.
    """
    relevance = require(signals, "text_relevance").float()
    return relevance if settings.negate else -relevance


STAGES = (
    Filter(local_text, local_text_signals, LocalText),
    Filter(received_attention, received_signals, Received),
    Filter(self_cross, frozenset({"visual_attention", "text_attention"})),
    Filter(text_relevance, frozenset({"text_relevance"}), Relevance),
)
