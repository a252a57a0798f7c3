"""Recoverable Compression: keep tokens by [CLS] attention, recover some by relevance for the text, merge the rest.

Filter: of K tokens half are chosen by [CLS] attention, a share by relevance for the text, and the remaining ones are
centres, again by attention.
Correlate: C_ij = a_i^CLS for the 32 sources nearest to centre j: cosine of the keys plus 1.8 times the
relevance for the text.
Compress (Eq. 10): X_j = X_j + sum_i C_ij X_i.

Signal: `text_relevance`, the mean cosine of a patch with the question: in CLIP's projections where the server has a
text encoder, as in the paper, else in the language model's embeddings.

The authors derive all three counts from the data, as local outliers of the scores. Here the prompt fixes the total,
and the parts are shares of it.

Deviation: the shares are ours, since the authors fix none. 32 and 1.8 (50 over the root of CLIP's projected
width of 768) are those of their code, of which we could read a copy only. The appended token for discarded tokens is
left out, as in PruMerge, from which their code takes the merging; attention and keys differ from theirs as there.
Their code puts the merged centres after the others; here the order is kept.

Source: arXiv:2409.01179, Sec. 3.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

RECOVERABLE = Method(
    name="recoverable",
    title="Recoverable Compression",
    site="features",
    source="2409.01179",
    summary="Keeps tokens by attention, recovers some that match the question and merges the others.",
    filter=FILTERS["text_recovery"],
    correlate=CORRELATIONS["recovery_attention"],
    compress=COMPRESSIONS["add"],
)
