"""CDPruner: a diverse subset of the tokens relevant for the question, by a conditional determinantal point process.

Filter: greedy maximum of det(L), L_ij = r_i * cos(f_i, f_j) * r_j, r the relevance for the text stretched
to 0..1.
Compress: prune.

Signal: `text_relevance`, the mean cosine of a patch with the question: in CLIP's projections where the server has a
text encoder, as in the paper, else in the language model's embeddings, as OpenVINO GenAI serves the method for models
other than LLaVA.

Deviation: as in the authors' code the relevance is negated (`negate`): CLIP's patches are most similar to a
text where the image does not show it. Their code measures cos(f_i, f_j) after the projector, on the
decoder's input; here it is measured on the features before it. It stretches the relevance by the extremes
of the whole batch; here by those of the image, so that the result does not depend on the batch.

Source: arXiv:2506.10967, Sec. 3.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

CDPRUNER = Method(
    name="cdpruner",
    title="CDPruner",
    site="features",
    source="2506.10967",
    summary="Keeps a varied set of tokens that matter for the question; drops the others.",
    filter=FILTERS["conditional_dpp"],
    correlate=CORRELATIONS["none"],
    compress=COMPRESSIONS["prune"],
)
