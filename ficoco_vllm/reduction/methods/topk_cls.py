"""TopK: keep the tokens that [CLS] attends to most.

Filter (Eq. 4): s_i = -a_i^CLS.
Compress: prune.

Deviation: the source names the baseline without details; the features are reduced once, by the attention of the last
executed layer.

Source: arXiv:2411.17686, Table 3.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

TOPK_CLS = Method(
    name="topk-cls",
    title="TopK",
    site="features",
    source="2411.17686",
    summary="Keeps the tokens that the image summary attends to most; drops the others.",
    filter=FILTERS["cls_attention"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["prune"],
)
