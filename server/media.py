"""Images of requests: what cannot be loaded is the client's error, never the server's."""

import os
import warnings
from typing import Any

from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from ficoco_vllm.plugin import MAX_PIXELS, MEDIA_CONNECTOR

# Pillow's own limit of pixels, and a file URL where no folder is allowed: vLLM answers both with HTTP 500.
_CLIENT_ERRORS = (Image.DecompressionBombError, RuntimeError)


@MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)
class FicocoMediaConnector(MediaConnector):
    """vLLM's connector; an image that is too large or not allowed is refused with HTTP 400.

    What all kinds of media are loaded through is guarded, not images alone: without settings of ours `ficoco-vllm
    serve` serves models that take videos and sounds too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take over the operator's limit of pixels; see vLLM's connector for the arguments."""
        super().__init__(*args, **kwargs)
        if limit := os.environ.get(MAX_PIXELS):
            # Pillow refuses twice of what it warns of; both are looked at before any pixel is unpacked.
            Image.MAX_IMAGE_PIXELS = int(limit) // 2
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        """Load one image.

        Args:
            image_url: of the request.
            image_mode: mode to convert to, None to keep it.

        Raises:
            VLLMValidationError: the image is too large, or its URL is not allowed.
        """
        try:
            image: Image.Image = super().fetch_image(image_url, image_mode=image_mode)
        except _CLIENT_ERRORS as error:
            raise _refusal(error) from error
        return image

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        """Load one image; see `fetch_image`."""
        try:
            image: Image.Image = await super().fetch_image_async(image_url, image_mode=image_mode)
        except _CLIENT_ERRORS as error:
            raise _refusal(error) from error
        return image

    def load_from_url(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """Load one medium of any kind.

        Args:
            url: of the request.
            args: as vLLM hands them in.
            kwargs: likewise.

        Raises:
            VLLMValidationError: the medium is on the network, and no domain is allowed.
        """
        self._check_address(url)
        return super().load_from_url(url, *args, **kwargs)

    async def load_from_url_async(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """Load one medium of any kind; see `load_from_url`."""
        self._check_address(url)
        return await super().load_from_url_async(url, *args, **kwargs)

    def _check_address(self, url: str) -> None:
        """Fetch from nowhere that the operator has not named: a server's network is not its clients'.

        Raises:
            VLLMValidationError: the medium is on the network, and no domain is allowed.
        """
        if url.lstrip()[:4].lower() == "http" and not self.allowed_media_domains:
            raise VLLMValidationError(
                "image_url: media are not fetched from the network; allowed: data URLs, or domains that the server "
                "was started with (--allowed-media-domains)",
                parameter="image_url",
            )


def _refusal(error: Exception) -> VLLMValidationError:
    return VLLMValidationError(f"image_url: {error}", parameter="image_url")
