"""PyramidDrop: drop the same share of the visual tokens at a few decoder layers.

Filter: s_i = minus the attention that token i receives from the last token of the instruction.
Compress: prune.
Schedule: geometric over the layers 8, 16 and 24 of 32; the authors halve at each.

Deviation: the authors rank by a product of that layer's queries and keys before the layer runs; here by the
attention of the layer itself, head mean, before its MLP.

Source: arXiv:2410.17247, Sec. 3.
"""

from typing import Literal

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.settings import Count, DecoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS


class PyramidDropKnobs(DecoderSettings):
    """Settings of PyramidDrop beyond its stages."""

    layers: tuple[Count, ...] | None = (8, 16, 24)
    schedule: Literal["even", "one-shot", "geometric"] | tuple[Count, ...] = "geometric"


PYRAMIDDROP = Method(
    name="pyramiddrop",
    title="PyramidDrop",
    site="decoder",
    source="2410.17247",
    filter=FILTERS["received_attention"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["prune"],
    knobs=PyramidDropKnobs,
)
