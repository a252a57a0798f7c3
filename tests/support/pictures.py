"""Made-up images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def noise(sizes: Sequence[tuple[int, int]], seed: int) -> list[Image.Image]:
    """Images of random pixels.

    Args:
        sizes: width and height of each.
        seed: of the pixels.
    """
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes
    ]
