"""FiCoCo-L: reduction in the decoder, between attention and MLP of its layers from the 4th on.

Filter (Eq. 14): s_i = beta / N * sum_j A_ij - (1 - beta) * sum_k A_ki, k over the text tokens.
Correlate (Eq. 15): C_ij = gamma * A_ij + (1 - gamma) * sum_k A_ki * A_kj.
Compress (Eq. 13): as in FiCoCo-V.

Signal: `text_attention`, which the reducing decoder layer measures from its own queries and keys.

Deviation: the paper writes A_ik for visual token i and text token k; in a causal decoder that is zero, so we read it
as the attention that i receives from k, A_ki, in both equations. The authors' release takes A_ik and
the pre-softmax, unmasked attention instead (`attention="logits"` gives the latter); sums its local term
where Eq. 14 has the mean over j, and averages the text term where it has the sum over k; looks for tau_i and
for targets among all visual tokens, not only those that stay; merges where C_ij > tau_i, gives every source
the K of the row with the most, and weighs by a softmax over the row; and sums where Eq. 13 divides by
1 + sum_i alpha_ij. We follow the paper.

Source: arXiv:2411.17686, Eqs. 13-15, Alg. 2.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.schedule import DECODER_START_LAYER
from ficoco_vllm.reduction.settings import AttentionSettings, Count, DecoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS


class FicocoLSettings(DecoderSettings, AttentionSettings):
    """Settings of FiCoCo-L beyond its stages: it starts at the 4th layer (Sec. 10)."""

    start_layer: Count | None = DECODER_START_LAYER


FICOCO_L = Method(
    name="ficoco-l",
    title="FiCoCo-L",
    site="decoder",
    source="2411.17686",
    summary="Merges tokens that the question attends to least, layer by layer in the language model.",
    filter=FILTERS["local_text"],
    correlate=CORRELATIONS["attention_via_text"],
    compress=COMPRESSIONS["quantile_merge"],
    own_settings=FicocoLSettings,
)
