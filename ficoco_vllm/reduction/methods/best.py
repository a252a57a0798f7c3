"""Preset of the most accurate composition in our search: DivPrune's choice, merged by keys, in FiCoCo-V's layers.

Filter: in every reducing layer keep the tokens that are farthest from one another (DivPrune's rule, on the hidden
states; 2503.02175, Alg. 1). Correlate: C_ij is the cosine of the keys, as in ToMe. Compress: FiCoCo's Eq. 13. Layers
and schedule are FiCoCo-V's.

The search ran on one split of the embedded benchmark; another split compared the result with FiCoCo-V and others
(benchmarks/results/composition.json, docs/log.md). The result holds for the demo model; measure other checkpoints
(`ficoco-vllm calibrate`, `bench lmms`). The filter picks one token after the other, so a reducing layer takes as many
small steps as it keeps tokens.

Source: arXiv:2411.17686, Eq. 13; arXiv:2503.02175, Alg. 1; arXiv:2210.09461, Sec. 3.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.settings import EncoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

BEST = Method(
    name="best",
    title="Best composition on the embedded benchmark",
    site="encoder",
    source="none",
    summary="Keeps tokens that differ most from each other and merges the others into similar ones.",
    filter=FILTERS["max_min_distance"],
    correlate=CORRELATIONS["key_cosine"],
    compress=COMPRESSIONS["quantile_merge"],
    own_settings=EncoderSettings,
)
