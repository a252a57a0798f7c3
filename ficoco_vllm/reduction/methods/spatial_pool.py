"""Spatial pooling: average the features over cells of the grid, one cell for each kept token.

Filter: the first token of each cell stays.
Correlate: C_ij = 1 in the same cell.
Compress (Eq. 9): each cell becomes its mean.

Deviation: the source names the baseline without details. Any number of cells is possible: bands of rows,
each cut along its columns, so that cells are of nearly equal size and shape (64 of 576 are 3 x 3 patches
each).

Source: arXiv:2411.17686, Table 3.
"""

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

SPATIAL_POOL = Method(
    name="spatial-pool",
    title="Spatial Pooling",
    site="features",
    source="2411.17686",
    summary="Averages neighbouring patches, like a smaller image.",
    filter=FILTERS["one_per_cell"],
    correlate=CORRELATIONS["same_cell"],
    compress=COMPRESSIONS["nearest_merge"],
)
