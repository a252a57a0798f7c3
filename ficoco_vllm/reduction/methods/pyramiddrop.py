"""PyramidDrop: drop the same share of the visual tokens at a few decoder layers.

Filter: s_i = minus the attention that token i receives from the last token of the instruction.
Compress: prune.
Schedule: geometric over the layers 8, 16 and 24 of 32; the authors halve at each.

Signal: `text_attention`, which the reducing decoder layer measures from its own queries and keys.

Deviation: the authors rank by the head-mean attention of the same layer, computed ahead, and drop before the
layer; here the tokens leave within the layer, before its MLP, so that its keys and values still hold them.
They renumber the tokens that stay; here these keep their positions.

Source: arXiv:2410.17247, Sec. 3.
"""

from typing import Literal

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.settings import Count, DecoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS


class PyramidDropSettings(DecoderSettings):
    """Settings of PyramidDrop beyond its stages."""

    layers: tuple[Count, ...] | None = (8, 16, 24)
    schedule: Literal["even", "one-shot", "geometric"] | tuple[Count, ...] = "geometric"


PYRAMIDDROP = Method(
    name="pyramiddrop",
    title="PyramidDrop",
    site="decoder",
    source="2410.17247",
    summary="Drops the same share of tokens at a few layers of the language model.",
    filter=FILTERS["received_attention"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["prune"],
    own_settings=PyramidDropSettings,
)
