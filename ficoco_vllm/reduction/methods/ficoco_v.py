"""FiCoCo-V: reduction in the vision encoder, between attention and MLP of its later layers.

Filter (Eq. 11, then the local penalty): s_i = lam / N * sum_j A_ij - (1 - lam) * a_i^CLS. A token that
draws much from other patches is replaceable; one that [CLS] looks at is not. Correlate (Eq. 12): C_ij =
A_ij. Compress (Eq. 13): each source flows into the targets above the epsilon-quantile of its row, by its
share.

Deviation: none in the equations. The authors' release takes the attention before the softmax where its
implementation offers no probabilities; `attention="logits"` asks the tower for the same.

Source: arXiv:2411.17686, Eqs. 11-13, Alg. 1.
"""

from typing import Literal

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.settings import EncoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS
from ficoco_vllm.reduction.stages.compress import QuantileMerge
from ficoco_vllm.reduction.stages.filter import LocalTask


class FicocoVSettings(LocalTask, QuantileMerge, EncoderSettings):
    """Settings of FiCoCo-V, with the paper's defaults (Sec. 10).

    Attributes:
        attention: what `visual_attention` and `cls_attention` are taken from: softmax probabilities or the
            scaled products before it.
    """

    attention: Literal["probs", "logits"] = "probs"


FICOCO_V = Method(
    name="ficoco-v",
    title="FiCoCo-V",
    site="encoder",
    source="2411.17686",
    settings=FicocoVSettings,
    filter=FILTERS["local_task"],
    correlate=CORRELATIONS["attention"],
    compress=COMPRESSIONS["quantile_merge"],
)
