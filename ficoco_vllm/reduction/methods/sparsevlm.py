"""SparseVLM: text raters score the visual tokens; the best discarded tokens are recycled into clusters.

Filter: raters are the text tokens whose similarity to the image is above average; s_i = minus their mean
attention to token i. Of the discarded tokens the best 30% are clustered around density peaks, ten to a
cluster; the peaks stay.
Correlate: a recycled token belongs to the nearest peak by its features.
Compress (Eq. 9): each cluster becomes its mean.

Signals: `text_attention`, which the reducing decoder layer measures from its own queries and keys, and
`text_features`, its own hidden states of the text.

The authors derive the number to drop from the rank of the attention, layer by layer. In their evaluation
they fix it by hand: 66, 30 and 17 tokens after layers 2, 6 and 15 of LLaVA-1.5 are their budget of 64, an
average over the layers, clusters not counted. Here the schedule fixes it, clusters included, and `keep` is
the number of tokens in the end.

Deviation: a cluster takes the position of its peak; the authors append it after the visual tokens. Their density has
a random part to break ties; here the first of equals counts as denser. They choose the raters once, on the decoder's
input; here `features` and `text_features` decide, the layer's own hidden states unless the model gives others. They
cluster and drop after a layer, we before its MLP. If no text token is above average, all of them rate; their code then
has no rater.

Source: arXiv:2410.04417, Sec. 3.
"""

from typing import Literal

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.settings import Count, DecoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS


class SparseVLMSettings(DecoderSettings):
    """Settings of SparseVLM beyond its stages: the layers of the authors' code."""

    layers: tuple[Count, ...] | None = (2, 6, 15)
    schedule: Literal["even", "one-shot", "geometric"] | tuple[Count, ...] = "geometric"


SPARSEVLM = Method(
    name="sparsevlm",
    title="SparseVLM",
    site="decoder",
    source="2410.04417",
    summary="Rates tokens by the question's words and recycles the best of the dropped ones.",
    filter=FILTERS["rate_and_recycle"],
    correlate=CORRELATIONS["cluster_likeness"],
    compress=COMPRESSIONS["nearest_merge"],
    own_settings=SparseVLMSettings,
)
