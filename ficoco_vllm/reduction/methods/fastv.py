"""FastV: drop the visual tokens that receive the least attention, once, early in the decoder.

Filter (Eq. 5): s_i = minus the attention that token i receives.
Compress: prune.

Signal: `text_attention`, which the reducing decoder layer measures from its own queries and keys.

Deviation: the paper averages over all queries (`queries="all"`); the authors' code takes the last prompt
token alone, and so do we, since their results come from it. Eq. 5 sums A_ij over j, the attention of token i to
others; its text says received attention, which is the column sum that we take. The authors drop the
tokens before layer 2, by the attention of layer 1; here they leave within layer 1, before its MLP.

Source: arXiv:2403.06764, Sec. 4; arXiv:2411.17686, Eq. 5.
"""

from typing import Literal

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.settings import Count, DecoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS


class FastVSettings(DecoderSettings):
    """Settings of FastV beyond its stages: once, after two layers (K = 2)."""

    start_layer: Count | None = 1
    schedule: Literal["even", "one-shot", "geometric"] | tuple[Count, ...] = "one-shot"


FASTV = Method(
    name="fastv",
    title="FastV",
    site="decoder",
    source="2403.06764",
    summary="Drops the tokens that receive the least attention, once, early in the language model.",
    filter=FILTERS["received_attention"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["prune"],
    own_settings=FastVSettings,
)
