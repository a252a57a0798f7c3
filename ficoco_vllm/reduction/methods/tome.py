"""ToMe: token merging between attention and MLP of the reducing encoder layers.

Filter (Eq. 3): even tokens may leave; s_i = the highest cosine of key i with the key of an odd token.
Correlate (Eq. 6): C_ij = that cosine, for odd targets j.
Compress (Eq. 9): each source into its best target, by the mean over the patches that they represent.

Deviation: Eq. 9 as printed is a plain mean (`size_weighted=False`); the ToMe paper and code weigh by size,
and so do we. The authors merge in every layer; here the start layer is that of the other methods in the
encoder, for a comparison of like with like (`start_layer=0` is theirs). They count [CLS] as the first token
and therefore start with the odd patches; here [CLS] is kept aside and the even patches may leave. They put
the remaining even tokens before the odd ones; here the order is kept. Proportional attention is on,
as the authors' `prop_attn` is for supervised models.

Source: arXiv:2210.09461, Sec. 3; arXiv:2411.17686, Eqs. 3, 6, 9.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.settings import EncoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS


class BipartiteSettings(EncoderSettings):
    """Settings of ToMe and of methods that build on it, beyond the stages."""

    proportional_attention: bool = True


TOME = Method(
    name="tome",
    title="ToMe",
    site="encoder",
    source="2210.09461",
    summary="Merges the most similar pairs of tokens, layer by layer in the vision tower.",
    filter=FILTERS["key_similarity"],
    correlate=CORRELATIONS["bipartite_cosine"],
    compress=COMPRESSIONS["nearest_merge"],
    own_settings=BipartiteSettings,
)
