"""FitPrune: drop tokens that neither the image nor the text attends to, by a recipe fitted beforehand.

Filter: s_i = -(mean over visual queries of A_ji) * (sum over text queries of A_ki).
Compress: prune.
Schedule: the recipe, that is, the number to drop at each layer, fitted offline so that the attention
distributions change least. Give it as `schedule=(...)`; without one the loss is spread evenly.

Deviation: the authors' code takes the highest attention over the heads where we have the mean. Their paper
drops the intersection of what is least in self- and in cross-attention; their code ranks by the product,
and so do we.

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
    filter=FILTERS["self_cross"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["prune"],
    knobs=DecoderSettings,
)
