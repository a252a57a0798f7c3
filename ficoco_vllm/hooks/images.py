"""Limits of images, which their readers apply before they unpack a pixel."""

from copy import copy
from typing import Any

from PIL import Image

from ficoco_vllm.hooks.wrapping import replace, wrap


def limit_pixels(most: int) -> None:
    """Let Pillow refuse images of more pixels, in this process. It warns from half as many on."""
    replace(Image, "MAX_IMAGE_PIXELS", most // 2)


def limit_bytes(media_io: Any, most: int) -> Any:
    """A copy of vLLM's `ImageMediaIO` that reads at most so many bytes."""
    limited = copy(media_io)
    wrap(limited, "get_max_bytes", lambda _: most)
    return limited
