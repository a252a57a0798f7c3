"""FiCoCo-V: reduction in the vision encoder, between attention and MLP of its later layers.

Filter (Eq. 11, then the local penalty): s_i = lam / N * sum_j A_ij - (1 - lam) * a_i^CLS. A token that attends much to
other patches is replaceable; one that [CLS] attends to is not.
Correlate (Eq. 12): C_ij = A_ij.
Compress (Eq. 13): each source flows into the targets above the epsilon-quantile of its row, by its share.

Deviation: we follow the paper's equations. The authors' release differs: it scales both terms of Eq. 11 to
unit length over the tokens before mixing them, and swaps their weights (0.65 for the local term, 0.35 for
[CLS]); it takes the attention before the softmax (`attention="logits"` asks the tower for that), merges
where C_ij > tau_i, with tau_i over all tokens, sources and [CLS] included, and gives every source the K of
the row with the most; it weighs by a softmax over the row, and each token by the patches that it represents, which
Eq. 13 does not.

Source: arXiv:2411.17686, Eqs. 11-13, Alg. 1.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.settings import AttentionSettings, EncoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS


class FicocoVSettings(EncoderSettings, AttentionSettings):
    """Settings of FiCoCo-V beyond its stages."""


FICOCO_V = Method(
    name="ficoco-v",
    title="FiCoCo-V",
    site="encoder",
    source="2411.17686",
    summary="Merges redundant tokens into related ones, layer by layer in the vision tower.",
    filter=FILTERS["local_task"],
    correlate=CORRELATIONS["attention"],
    compress=COMPRESSIONS["quantile_merge"],
    own_settings=FicocoVSettings,
)
