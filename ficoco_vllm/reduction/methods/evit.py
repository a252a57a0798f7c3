"""EViT: keep the tokens with the highest [CLS] attention, fuse the rest into one token, in the encoder.

Filter (Eq. 4): s_i = -a_i^CLS.
Correlate (Eq. 7): C_i = a_i^CLS; the only target is a zero vector.
Compress (Eq. 10): append sum_i C_i X_i.

Deviation: the authors sort the kept tokens by attention; here the order is kept. The weights are the
attention itself, which sums to less than one over the sources, as in their code. They keep the same share
(0.7) at three of twelve layers, the 4th, the 7th and the 10th, of a model trained for it; here the schedule
is that of the other methods in the encoder, even from the start layer on.

Source: arXiv:2202.07800, Sec. 3; arXiv:2411.17686, Eqs. 4, 7, 10.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.settings import EncoderSettings
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

EVIT = Method(
    name="evit",
    title="EViT",
    site="encoder",
    source="2202.07800",
    summary="Keeps the tokens that the image summary attends to most; fuses the others into one new token.",
    filter=FILTERS["cls_attention"],
    correlate=CORRELATIONS["cls_weight"],
    compress=COMPRESSIONS["fuse"],
    own_settings=EncoderSettings,
)
