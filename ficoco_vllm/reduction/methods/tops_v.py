"""TOPS, first stage: relevance, coverage and diversity decide together which visual tokens enter the decoder.

Filter (Alg. 1): greedy picks by a_i + alpha * d_i + lambda * c_i: [CLS] attention, distance to the picks and coverage
gain, each divided by its mean over the candidates.
Compress: prune.

`tops` runs this stage and then `tops-l`.

Deviation: the paper measures cosines after the projector; here they are measured before it, where the reduction saves
the projector's work too. Eq. 6 scales the terms by minimum and maximum, Algorithm 1 by their mean; we follow the
algorithm. The paper does not say over which tokens the mean runs; here over those not picked yet.

Source: arXiv:2606.27161, Sec. 4, Alg. 1.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

TOPS_V = Method(
    name="tops-v",
    title="TOPS, first stage",
    site="features",
    source="2606.27161",
    summary="Keeps tokens that matter, that cover the image and that differ from each other; drops the others.",
    filter=FILTERS["preservation_set"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["prune"],
)
