"""Conversion of images to the tower's input."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.demo_model.architecture import ARCHITECTURE, IMAGE_MEAN, IMAGE_STD

P = ARCHITECTURE.patch_size


def to_patches(images: list[NDArray[np.uint8]], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normalise images and cut them as CLIP's convolution does.

    Args:
        images: (height, width, 3) uint8 each, all of one size.
        dtype: data type of the result.

    Returns:
        (B, rows * columns, 3 * P * P), channel first inside a patch.
    """
    pixels = torch.from_numpy(np.stack(images)).float().div_(255)
    pixels = (pixels - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    B, height, width, _ = pixels.shape
    cut = pixels.view(B, height // P, P, width // P, P, 3).permute(0, 1, 3, 5, 2, 4)
    return cut.reshape(B, -1, 3 * P * P).to(dtype)
