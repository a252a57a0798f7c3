"""VisionZip: dominant tokens by [CLS] attention, contextual tokens for the rest.

Filter: of K tokens all but a share are those with the highest [CLS] attention (dominant); the share is spread evenly
over the others (contextual): 10 of 64, 20 of 128 and 30 of 192, as in the source.
Correlate: C_ij = cosine of the head-mean keys, for contextual targets j.
Compress (Eq. 9): each source into its most similar contextual token, by the mean.

Deviation: the authors' code adds the mean of the sources to the contextual token, which doubles its norm;
their paper averages, and so do we. Their code puts the contextual tokens after the dominant ones; here all tokens
keep their order. They also pass on [CLS] and count it among the dominant tokens (53 patches of their 54); a LLaVA's
prompt has no place for it.

Source: arXiv:2412.04467, Sec. 3.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

VISIONZIP = Method(
    name="visionzip",
    title="VisionZip",
    site="features",
    source="2412.04467",
    summary="Keeps the tokens with the most attention and merges the others into evenly spread ones.",
    filter=FILTERS["dominant_contextual"],
    correlate=CORRELATIONS["contextual_cosine"],
    compress=COMPRESSIONS["nearest_merge"],
)
