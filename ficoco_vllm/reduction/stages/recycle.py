"""Scores of the visual tokens by text raters; part of the discarded tokens is recycled into clusters."""

import torch
from pydantic import Field
from torch import Tensor

from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Partition, Signals, ranks, require, take
from ficoco_vllm.reduction.stage import Correlation, Filter
from ficoco_vllm.reduction.stages.correlate import NOWHERE


class Recycling(Settings):
    """Settings of SparseVLM.

    Attributes:
        recycled_share: part of the discarded tokens, the best of them, that is recycled.
        tokens_per_cluster: how many recycled tokens make one cluster.
    """

    recycled_share: float = Field(default=0.3, ge=0.0, le=1.0)
    tokens_per_cluster: int = Field(default=10, ge=1)

    def counts(self, num_tokens: int, num_kept: int) -> tuple[int, int, int]:
        """Numbers of selected tokens, recycled tokens, and clusters: the first and the last make up `num_kept`."""
        for selected in range(num_kept, -1, -1):
            discarded = num_tokens - selected
            recycled = min(discarded, int(discarded * self.recycled_share) + 1)
            clusters = min(recycled, recycled // self.tokens_per_cluster + 1)
            if selected + clusters <= num_kept:
                return num_kept - clusters, recycled, clusters
        return 0, recycled, num_kept  # fewer tokens than clusters: only clusters


def rating(signals: Signals) -> Tensor:
    """Mean attention of the text raters: the text tokens whose similarity to the image is above average.

    The similarity of text token k is the mean over visual tokens of softmax_k(features . text_features).

    Args:
        signals: `text_attention` (B, M, N), `features` (B, N, Df) and `text_features` (B, M, Df).

    Returns:
        (B, N) fp32, higher is better. Where no text token stands out, all of them rate.

    Source: arXiv:2410.04417, Sec. 3.
    """
    visual, text = require(signals, "features").float(), require(signals, "text_features").float()
    similarity = (visual @ text.transpose(1, 2)).softmax(dim=-1).mean(dim=1)
    rater = (similarity > similarity.mean(dim=-1, keepdim=True)).float()
    rater = torch.where(rater.sum(dim=-1, keepdim=True) > 0, rater, 1.0)
    rated = torch.bmm(rater[:, None], require(signals, "text_attention").float())[:, 0]
    return rated / rater.sum(dim=-1, keepdim=True)


def rate_and_recycle(signals: Signals, settings: Recycling, num_removed: int) -> Tensor:
    """Keep the best rated tokens, and the cluster centres among the next best.

    Centres are density peaks: dense around them, and far from any denser token.

    Args:
        signals: `text_attention` (B, M, N), `features` (B, N, Df) and `text_features` (B, M, Df).
        settings: see `Recycling`.
        num_removed: R.

    Returns:
        (B, N) fp32 redundancy, 0 for those to keep and 1 for the rest.

    Source: arXiv:2410.04417, Sec. 3.
    """
    rated = rating(signals)
    N = rated.shape[1]
    num_selected, num_recycled, num_clusters = settings.counts(N, N - num_removed)
    order = rated.sort(dim=-1, descending=True, stable=True).indices
    selected, recycled = order[:, :num_selected], order[:, num_selected : num_selected + num_recycled]
    features = take(require(signals, "features"), recycled).float()
    distance = torch.cdist(features, features) / features.shape[-1] ** 0.5
    nearest = distance.topk(num_clusters, dim=-1, largest=False).values
    density = (-nearest.square().mean(dim=-1)).exp()
    # Among equally dense tokens the first counts as the denser one, so that exactly one has none above it.
    place = ranks(density)
    denser = place[:, None] < place[..., None]
    farthest = distance.flatten(1).amax(dim=-1)[:, None, None]
    gap = torch.where(denser, distance, farthest).amin(dim=-1)
    peaks = (gap * density).sort(dim=-1, descending=True, stable=True).indices[:, :num_clusters]
    keep = torch.cat([selected, recycled.gather(1, peaks)], dim=1)
    return torch.ones_like(rated).scatter(1, keep, 0.0)


def cluster_likeness(signals: Signals, partition: Partition, settings: Recycling) -> Tensor:
    """C_ij = 1 / (1 + distance of the features) of the recycled source i to the cluster centre j.

    Args:
        signals: `text_attention` (B, M, N), `features` (B, N, Df) and `text_features` (B, M, Df).
        partition: R sources and K targets.
        settings: see `Recycling`.

    Returns:
        (B, R, K) fp32, `NOWHERE` for sources that are not recycled and targets that are not centres.

    Source: arXiv:2410.04417, Sec. 3.
    """
    K = partition.target.shape[1]
    num_selected, num_recycled, _ = settings.counts(partition.source.shape[1] + K, K)
    place = ranks(rating(signals))
    recycled = take(place, partition.source) < num_selected + num_recycled
    centre = take(place, partition.target) >= num_selected
    features = require(signals, "features")
    source, target = take(features, partition.source).float(), take(features, partition.target).float()
    likeness = 1.0 / (1.0 + torch.cdist(source, target) / source.shape[-1] ** 0.5)
    return torch.where(recycled[..., None] & centre[:, None], likeness, NOWHERE)


RATERS = frozenset({"text_attention", "features", "text_features"})

STAGES = (
    Filter(rate_and_recycle, RATERS, Recycling),
    Correlation(cluster_likeness, RATERS, Recycling, partners=()),
)
