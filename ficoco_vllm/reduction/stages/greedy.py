"""Filters that pick one token after another.

The picks loop over the kept tokens, for each depends on those before; every step is batched over the images
and has no host synchronisation.
"""

import torch
from torch import Tensor

from ficoco_vllm import kernels
from ficoco_vllm.kernels import Backend
from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Signals, require
from ficoco_vllm.reduction.stage import Filter
from ficoco_vllm.reduction.stages.text_filter import Relevance

# A gain of the determinantal process below this fraction of its initial value is a rounding error of fp64.
_SPENT = 1e-10


def cosines(signals: Signals, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosine between the features of all pairs, (B, N, N)."""
    features = torch.nn.functional.normalize(require(signals, "features").to(dtype), dim=-1)
    return features @ features.transpose(1, 2)


def row_of(matrix: Tensor, pick: Tensor) -> Tensor:
    """One row per image: (B, N, N) at (B,) gives (B, N)."""
    return matrix[torch.arange(pick.shape[0], device=pick.device), pick]


def max_min_distance(
    signals: Signals, settings: Settings, num_removed: int, backend: Backend = "torch"
) -> Tensor:
    """Keep tokens that are as far as possible from one another.

    The first pick is the token whose nearest neighbour is farthest; each further one is the token farthest from all
    picks. Distance is one minus the cosine of the features.

    Args:
        signals: `features` (B, N, Df), N at least 2.
        settings: none.
        num_removed: R.
        backend: implementation of the fused op.

    Returns:
        (B, N) fp32 redundancy, 0 for those to keep and 1 for the rest.

    Source: arXiv:2503.02175, Alg. 1.
    """
    distance = 1.0 - cosines(signals)
    nearest = distance.topk(2, dim=-1, largest=False).values[..., 1]  # the smallest is to itself
    num_kept = distance.shape[1] - num_removed
    return kernels.farthest_points(distance, nearest.argmax(dim=-1), num_kept, backend=backend)


def conditional_dpp(signals: Signals, settings: Relevance, num_removed: int) -> Tensor:
    """Keep the tokens that maximise the determinant of L_ij = r_i * cos(f_i, f_j) * r_j, greedily.

    r is the relevance for the text, stretched to 0..1 within the image. Each step picks the token with the
    largest gain, which an incremental Cholesky factor keeps up to date, in fp64. Once the features span no more
    dimensions there is nothing to gain, and the most relevant of the others are kept.

    Args:
        signals: `features` (B, N, Df) and `text_relevance` (B, N).
        settings: see `Relevance`.
        num_removed: R.

    Returns:
        (B, N) fp32 redundancy, 0 for those to keep and 1 for the rest.

    Source: arXiv:2506.10967, Sec. 3.
    """
    relevance = require(signals, "text_relevance").double()
    relevance = -relevance if settings.negate else relevance
    low, high = relevance.aminmax(dim=-1, keepdim=True)
    # The small number keeps every token eligible, and equal relevances at 1.
    relevance = (relevance - low + 1e-6) / (high - low + 1e-6)
    kernel = relevance[..., None] * cosines(signals, torch.float64) * relevance[:, None]
    B, N = relevance.shape
    K = N - num_removed
    whole = kernel.diagonal(dim1=1, dim2=2)
    gain = whole.clone()
    factor = kernel.new_zeros(B, K, N)
    redundancy = kernel.new_ones(B, N, dtype=torch.float32)
    for step in range(K):
        spent = gain < _SPENT * whole
        # Below all gains, in order of relevance; tokens picked before are lower still.
        pick = torch.where(redundancy > 0, torch.where(spent, whole - 2, gain), -torch.inf).argmax(
            -1, keepdim=True
        )
        before = factor[:, :step]
        weight = before.gather(2, pick[:, None].expand(B, step, 1))
        row = row_of(kernel, pick[:, 0]) - torch.bmm(weight.transpose(1, 2), before)[:, 0]
        factor[:, step] = torch.where(spent.gather(1, pick), 0, row * gain.gather(1, pick).rsqrt())
        redundancy = redundancy.scatter(1, pick, 0.0)
        gain = gain - factor[:, step].square()
    return redundancy


STAGES = (
    Filter(max_min_distance, frozenset({"features"})),
    Filter(conditional_dpp, frozenset({"features", "text_relevance"}), Relevance),
)
