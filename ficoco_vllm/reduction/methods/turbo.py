"""Turbo: ToMe with an information degree instead of the similarity alone.

Filter: s_i = R_i - alpha * a_i^CLS for even tokens, with R_i the similarity of ToMe (Eq. 3): tokens unlike the others,
or with high [CLS] attention, are informative and stay.
Correlate and compress: as ToMe (Eqs. 6 and 9).

Deviation: the default of alpha is ours, since no LLaVA is among the models of the source: 10 lets the
attention, at most a few hundredths for a patch, weigh against cosines that lie close together; the authors'
code for BLIP multiplies an alpha of its own by 30. Their code can let the weight of the attention grow or
shrink from layer to layer; here it is the same in all. For the start layer and the order of the tokens see
ToMe. For generation the authors restore the merged tokens afterwards, which a LLaVA does not need.

Source: arXiv:2407.11717, Sec. 3.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.methods.tome import BipartiteSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

TURBO = Method(
    name="turbo",
    title="Turbo",
    site="encoder",
    source="2407.11717",
    summary="Merges similar tokens as ToMe does, and spares those that carry much information.",
    filter=FILTERS["informativity"],
    correlate=CORRELATIONS["bipartite_cosine"],
    compress=COMPRESSIONS["nearest_merge"],
    own_settings=BipartiteSettings,
)
