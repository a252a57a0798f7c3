"""VScan, first stage: tokens that a shallow or the last [CLS] attention singles out; the others merge into them.

Filter: a local scan keeps the best tokens of each window of 6 x 6 patches by the [CLS] attention of a shallow layer, a
global scan the best of the others by that of the last layer; half of the tokens each.
Correlate: C_ij = cosine of the features.
Compress: each source into its most similar target, by the mean.

Signal: `shallow_cls_attention`, of the 6th layer of 24.

`vscan` runs this stage and then `vscan-l`.

Deviation: the authors measure the cosine after the projector and merge there; here both happen before it, where the
reduction saves the projector's work too. Where the windows do not divide their half, their code keeps fewer tokens;
here the global scan takes the rest.

Source: arXiv:2505.22654, Sec. 3.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

VSCAN_V = Method(
    name="vscan-v",
    title="VScan, first stage",
    site="features",
    source="2505.22654",
    summary="Keeps the best tokens of each part of the image and of all of it; merges the others into them.",
    filter=FILTERS["two_scans"],
    correlate=CORRELATIONS["feature_cosine"],
    compress=COMPRESSIONS["nearest_merge"],
)
