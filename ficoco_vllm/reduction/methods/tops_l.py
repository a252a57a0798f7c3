"""TOPS, second stage: the choice of the first stage, with relevance for the text, at two decoder layers.

Filter (Alg. 2): as `tops-v`; the relevance is the attention of the text raters, the text tokens that fit the image.
Compress: prune.
Schedule: geometric over the layers 12 and 24 of 32.

Signals: `text_attention`, which the reducing decoder layer measures from its own queries and keys, and
`text_features`, its own hidden states of the text.

Deviation: the paper halves the tokens at the first layer and leaves a quarter at the second; here both leave the same
share. It does not define its threshold for text raters; here they are those of SparseVLM. It renumbers the kept
tokens; here they keep their positions. Its coverage weight is 0.4 to 1.0 by model and budget; the default is the
0.5 of most of its models.

Source: arXiv:2606.27161, Sec. 4, Alg. 2, Table 9.
"""

from typing import Literal

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.settings import Count, DecoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS


class TopsLSettings(DecoderSettings):
    """Settings of TOPS's second stage beyond its filter: the paper's layers."""

    layers: tuple[Count, ...] | None = (12, 24)
    schedule: Literal["even", "one-shot", "geometric"] | tuple[Count, ...] = "geometric"


TOPS_L = Method(
    name="tops-l",
    title="TOPS, second stage",
    site="decoder",
    source="2606.27161",
    summary="As TOPS's first stage, for the question, at two layers of the language model.",
    filter=FILTERS["rated_preservation_set"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["prune"],
    own_settings=TopsLSettings,
)
