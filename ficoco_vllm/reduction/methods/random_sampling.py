"""Random sampling: keep tokens at random.

Filter: s_i = a hash of the seed and of the position: the same tokens on every machine and for every image.
Compress: prune.

Deviation: the source names the baseline without details; the features of the encoder are sampled once.

Source: arXiv:2411.17686, Table 3.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

RANDOM = Method(
    name="random",
    title="Random Sampling",
    site="features",
    source="2411.17686",
    summary="Keeps tokens at random: the baseline that any method should beat.",
    filter=FILTERS["random_order"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["prune"],
)
