"""Images as LLaVA-1.5 was evaluated with: padded to squares, nothing cropped."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from PIL import Image

# CLIP's mean colour, which becomes zero once the pixels are normalised.
MEAN_COLOUR = (122, 116, 104)


def pad_to_square(image: Image.Image) -> Image.Image:
    """The image in the middle of a square of CLIP's mean colour.

    Source: arXiv:2310.03744, Sec. 3.2; `image_aspect_ratio: pad` of LLaVA-1.5.
    """
    image = image.convert("RGB")
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def padded(doc_to_visual: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A task's function with its images padded."""

    @wraps(doc_to_visual)
    def wrapper(*args: Any, **kwargs: Any) -> list[Any]:
        return [
            pad_to_square(visual) if isinstance(visual, Image.Image) else visual
            for visual in doc_to_visual(*args, **kwargs)
        ]

    return wrapper
