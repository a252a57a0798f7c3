"""SparseVLM: text raters score the visual tokens; the best of what is dropped is recycled into clusters.

Filter: raters are the text tokens that the image is more alike to than average; s_i = minus their mean
attention to token i. Of the discarded tokens the best 30% are clustered around density peaks, ten to a
cluster; the peaks stay.
Correlate: a recycled token belongs to the nearest peak by its features.
Compress (Eq. 9): each cluster becomes its mean.

The authors derive the number to drop from the rank of the attention, layer by layer, and fix it in their
evaluation; here the schedule fixes it, clusters included.

Deviation: a cluster stands at the position of its peak, where the authors append it behind the visual
tokens. Their density has a random part against equal values; here the first of equals counts as denser.
They choose the raters once, on the decoder's input; here `features` and `text_features` decide, the layer's
own hidden states unless the model gives others.

Source: arXiv:2410.04417, Sec. 3.
"""

from typing import Literal

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.settings import Count, DecoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS


class SparseVLMKnobs(DecoderSettings):
    """Settings of SparseVLM beyond its stages: the layers of the authors' code."""

    layers: tuple[Count, ...] | None = (2, 6, 15)
    schedule: Literal["even", "one-shot", "geometric"] | tuple[Count, ...] = "geometric"


SPARSEVLM = Method(
    name="sparsevlm",
    title="SparseVLM",
    site="decoder",
    source="2410.04417",
    filter=FILTERS["rate_and_recycle"],
    correlate=CORRELATIONS["cluster_likeness"],
    compress=COMPRESSIONS["nearest_merge"],
    knobs=SparseVLMKnobs,
)
