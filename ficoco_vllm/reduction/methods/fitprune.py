"""FitPrune: drop tokens that neither the image nor the text attends to, by a recipe fitted beforehand.

Filter: s_i = -(mean over visual queries of A_ji) * (sum over text queries of A_ki).
Compress: prune.
Schedule: the recipe is the number to drop at each layer, fitted offline so that the attention distributions change
least. Give it as `schedule=(...)`; without one the loss is spread evenly.

Signal: `text_attention`, which the reducing decoder layer measures from its own queries and keys.

Deviation: the authors' code takes the highest attention over the heads where we have the mean. Their paper
drops the intersection of the lowest in self- and in cross-attention, and so does their fitting; their
inference ranks by the product, and so do we. Their recipes are fitted to LLaVA-1.5-7B and start at its
first layer (`start_layer=0`); none of them is built in.

Source: arXiv:2409.10197, Sec. 3.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.settings import DecoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

FITPRUNE = Method(
    name="fitprune",
    title="FitPrune",
    site="decoder",
    source="2409.10197",
    summary="Drops tokens that neither the image nor the question attends to, by a recipe fitted beforehand.",
    filter=FILTERS["self_cross"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["prune"],
    own_settings=DecoderSettings,
)
