"""VScan, second stage: drop the visual tokens that receive the least attention, once, in the middle of the decoder.

Filter (Eq. 5): s_i = minus the attention that token i receives from the last token of the instruction.
Compress: prune.
Schedule: all at layer 16 of 32.

Signal: `text_attention`, which the reducing decoder layer measures from its own queries and keys.

Deviation: as for PyramidDrop, whose code the authors use, the tokens leave within the layer, before its MLP, and keep
their positions.

Source: arXiv:2505.22654, Sec. 3.
"""

from typing import Literal

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.settings import Count, DecoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS


class VScanLSettings(DecoderSettings):
    """Settings of VScan's second stage beyond its filter: the authors' layer."""

    layers: tuple[Count, ...] | None = (16,)
    schedule: Literal["even", "one-shot", "geometric"] | tuple[Count, ...] = "one-shot"


VSCAN_L = Method(
    name="vscan-l",
    title="VScan, second stage",
    site="decoder",
    source="2505.22654",
    summary="Drops the tokens that receive the least attention, once, in the middle of the language model.",
    filter=FILTERS["received_attention"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["prune"],
    own_settings=VScanLSettings,
)
