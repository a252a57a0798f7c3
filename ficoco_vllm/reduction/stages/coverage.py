"""Greedy picks by coverage: how much better the kept tokens stand for all of them once a token is added."""

import torch
from pydantic import Field
from torch import Tensor

from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Signals, require
from ficoco_vllm.reduction.stage import Filter
from ficoco_vllm.reduction.stages.greedy import cosines, row_of
from ficoco_vllm.reduction.stages.recycle import RATERS, rating


class Saliency(Settings):
    """Settings of SCOPE.

    Attributes:
        saliency: exponent of the [CLS] attention (the paper's alpha); 0 leaves coverage alone.
    """

    saliency: float = Field(default=1.0, ge=0.0)


class Balance(Settings):
    """Settings of TOPS.

    Attributes:
        diversity: weight of the distance to the picks (the paper's alpha).
        coverage: weight of the coverage gain (the paper's lambda).
    """

    diversity: float = Field(default=0.5, ge=0.0)
    coverage: float = Field(default=0.5, ge=0.0)


def salient_coverage(signals: Signals, settings: Saliency, num_removed: int) -> Tensor:
    """Pick argmax_i a_i^saliency * sum_j max(0, cos(f_i, f_j) - max_k cos(f_j, f_k)), k over the picks so far.

    Args:
        signals: `features` (B, N, Df) and `cls_attention` (B, N).
        settings: see `Saliency`.
        num_removed: R.

    Returns:
        (B, N) fp32 redundancy, 0 for those to keep and 1 for the rest.

    Source: arXiv:2510.24214, Sec. 3.
    """
    likeness = cosines(signals)
    scratch = torch.empty_like(likeness)
    weight = require(signals, "cls_attention").float() ** settings.saliency
    redundancy = torch.ones_like(weight)
    covered = torch.zeros_like(weight)
    for _ in range(weight.shape[1] - num_removed):
        score = weight * _gain(likeness, covered, scratch)
        pick = torch.where(redundancy > 0, score, -torch.inf).argmax(dim=-1, keepdim=True)
        redundancy = redundancy.scatter(1, pick, 0.0)
        covered = torch.maximum(covered, row_of(likeness, pick[:, 0]))
    return redundancy


def preservation_set(signals: Signals, settings: Balance, num_removed: int) -> Tensor:
    """Pick argmax_i of relevance + diversity * d_i + coverage * c_i, each divided by its mean over the candidates.

    d_i is one minus the highest cosine to a pick, c_i the coverage gain over the candidates. The relevance is the [CLS]
    attention; the most relevant token is the first pick.

    Args:
        signals: `features` (B, N, Df) and `cls_attention` (B, N).
        settings: see `Balance`.
        num_removed: R.

    Returns:
        (B, N) fp32 redundancy, 0 for those to keep and 1 for the rest.

    Source: arXiv:2606.27161, Alg. 1.
    """
    return _preservation_set(require(signals, "cls_attention").float(), signals, settings, num_removed)


def rated_preservation_set(signals: Signals, settings: Balance, num_removed: int) -> Tensor:
    """Pick as `preservation_set`, with the attention of the text raters as relevance.

    Args:
        signals: `text_attention` (B, M, N), `features` (B, N, Df) and `text_features` (B, M, Df).
        settings: see `Balance`.
        num_removed: R.

    Returns:
        (B, N) fp32 redundancy, 0 for those to keep and 1 for the rest.

    Source: arXiv:2606.27161, Alg. 2.
    """
    return _preservation_set(rating(signals), signals, settings, num_removed)


def _preservation_set(relevance: Tensor, signals: Signals, settings: Balance, num_removed: int) -> Tensor:
    likeness = cosines(signals)
    scratch = torch.empty_like(likeness)
    N, num_kept = relevance.shape[1], relevance.shape[1] - num_removed
    pick = relevance.argmax(dim=-1, keepdim=True)
    redundancy = torch.ones_like(relevance).scatter(1, pick, 0.0)
    covered = row_of(likeness, pick[:, 0])
    for num_picked in range(1, num_kept):
        terms = torch.stack([relevance, 1.0 - covered, _gain(likeness, covered, scratch)], dim=1)
        mean = (terms * redundancy[:, None]).sum(dim=-1, keepdim=True) / (N - num_picked)
        # A term that is zero for all candidates decides nothing.
        scaled = terms / torch.where(mean > torch.finfo(mean.dtype).tiny, mean, torch.inf)
        score = scaled[:, 0] + settings.diversity * scaled[:, 1] + settings.coverage * scaled[:, 2]
        pick = torch.where(redundancy > 0, score, -torch.inf).argmax(dim=-1, keepdim=True)
        redundancy = redundancy.scatter(1, pick, 0.0)
        covered = torch.maximum(covered, row_of(likeness, pick[:, 0]))
    return redundancy


def _gain(likeness: Tensor, covered: Tensor, scratch: Tensor) -> Tensor:
    """sum_j max(0, likeness_ij - covered_j): (B, N, N) and (B, N) give (B, N).

    Picks cover themselves, so the sum over all tokens is the one over the candidates. `scratch` (B, N, N) is
    overwritten: to allocate it in every step takes most of the time on a CPU.
    """
    return torch.sub(likeness, covered[:, None], out=scratch).clamp_min_(0).sum(dim=-1)


STAGES = (
    Filter(salient_coverage, frozenset({"features", "cls_attention"}), Saliency),
    Filter(preservation_set, frozenset({"features", "cls_attention"}), Balance),
    Filter(rated_preservation_set, RATERS, Balance),
)
