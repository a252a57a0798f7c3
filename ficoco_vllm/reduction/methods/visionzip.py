"""VisionZip: dominant tokens by [CLS] attention, contextual tokens for the rest.

Filter: of K tokens all but a share stay for their attention (dominant); the share is spread evenly over the
others (contextual): 10 of 64, as the authors have it.
Correlate: C_ij = cosine of the keys, for contextual targets j.
Compress (Eq. 9): each source into its most alike contextual token, by the mean.

Deviation: the authors' code adds the mean of the sources to the contextual token, which doubles its norm;
their paper averages, and so do we. They also pass on [CLS]; a LLaVA's prompt has no place for it.

Source: arXiv:2412.04467, Sec. 3.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

VISIONZIP = Method(
    name="visionzip",
    title="VisionZip",
    site="features",
    source="2412.04467",
    filter=FILTERS["dominant_contextual"],
    correlate=CORRELATIONS["contextual_cosine"],
    compress=COMPRESSIONS["nearest_merge"],
)
