"""TRIM: keep the tokens relevant for the text, average the rest into one token.

Filter: s_i = minus the relevance of token i for the text.
Compress: append the mean of all discarded tokens.

Signal: `text_relevance`, the mean cosine of a patch with the question: in CLIP's projections where the server has a
text encoder, as in the paper, else in the language model's embeddings.

The authors keep as many tokens as there are outliers of the relevance, so the count depends on image and
text. Here the prompt fixes the count, and the most relevant tokens stay, outliers or not.

Deviation: as in the authors' code the relevance is negated (`negate`), which the paper does not say. Their code takes
the plain product of patch and text, here it is the cosine. Their softmax over the tokens is left out: it changes no
order.

Source: arXiv:2409.10994, Sec. 3.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

TRIM = Method(
    name="trim",
    title="TRIM",
    site="features",
    source="2409.10994",
    summary="Keeps the tokens that match the question and averages the others into one new token.",
    filter=FILTERS["text_relevance"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["fuse_mean"],
)
