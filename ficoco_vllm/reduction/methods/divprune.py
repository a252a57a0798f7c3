"""DivPrune: keep the subset of features with the largest smallest distance between any two.

Filter: greedy picks; first the token whose nearest neighbour is farthest, then the one farthest from all
picks. Distance is one minus the cosine of the features.
Compress: prune.

Deviation: the authors measure the distance after the projector, on the decoder's input; here it is measured
on the features before it, where the reduction saves the projector's work too.

Source: arXiv:2503.02175, Eq. 3, Alg. 1.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

DIVPRUNE = Method(
    name="divprune",
    title="DivPrune",
    site="features",
    source="2503.02175",
    summary="Keeps tokens that differ most from each other; drops the others.",
    filter=FILTERS["max_min_distance"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["prune"],
)
