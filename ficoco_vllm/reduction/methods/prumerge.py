"""LLaVA-PruMerge and PruMerge+: keep outliers of the [CLS] attention, add their neighbours to them.

Filter: PruMerge keeps the tokens that [CLS] attends to most (Eq. 4); PruMerge+ keeps the outliers of that
attention (more than 1.5 interquartile ranges above the third quartile) and fills up with evenly spaced
tokens.
Correlate: C_ij = a_i^CLS for the 32 sources i whose keys are most similar to that of target j.
Compress (Eq. 10): X_j = X_j + sum_i C_ij X_i.

The authors keep as many tokens as there are outliers, so the count depends on the image. Here the prompt, which is
sized before any image is seen, fixes the count. With fewer outliers PruMerge continues down the ranking and PruMerge+
adds more evenly spaced tokens (the authors about three for each outlier); with more outliers both keep the most
attended of them.

Deviation: neighbours are sought among the discarded tokens only; in the authors' code kept ones are added
to each other as well, though none of them is lost. Their code also appends one token for all discarded ones, which
their paper does not have; we follow the paper. As in their code, the centre itself has the
weight 1. Their attention and keys are those of the last layer, taken over the full width as if it had one
head; here they are the head means of the last layer that a LLaVA runs, the one before it. They put the
tokens in order of attention; here the order is kept.

Source: arXiv:2403.15388, Sec. 3, Alg. 1.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

PRUMERGE = Method(
    name="prumerge",
    title="LLaVA-PruMerge",
    site="features",
    source="2403.15388",
    summary="Keeps the tokens that the image summary attends to most and adds their neighbours to them.",
    filter=FILTERS["cls_attention"],
    correlate=CORRELATIONS["neighbour_attention"],
    compress=COMPRESSIONS["add"],
)

PRUMERGE_PLUS = Method(
    name="prumerge-plus",
    title="LLaVA-PruMerge+",
    site="features",
    source="2403.15388",
    summary="As PruMerge, with tokens spread evenly over the image in addition.",
    filter=FILTERS["outlier_then_even"],
    correlate=CORRELATIONS["neighbour_attention"],
    compress=COMPRESSIONS["add"],
)
