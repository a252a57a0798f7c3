"""SCOPE: keep tokens that are salient and that cover what the kept ones do not stand for yet.

Filter: greedy picks; the next one has the largest product of its [CLS] attention and its coverage gain,
sum_j max(0, cos(f_i, f_j) - max_k cos(f_j, f_k)) with k over the picks so far.
Compress: prune.

The paper raises the attention to a power alpha (`saliency`), which is 1 in the authors' code unless it is set.

Deviation: their code sums the attention over the heads where we take the mean, which changes no order.

Source: arXiv:2510.24214, Sec. 3.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

SCOPE = Method(
    name="scope",
    title="SCOPE",
    site="features",
    source="2510.24214",
    summary="Keeps tokens that matter and that stand for parts of the image that no kept token covers yet.",
    filter=FILTERS["salient_coverage"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["prune"],
)
