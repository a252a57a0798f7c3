"""Image loader: a medium that cannot be loaded is the client's error, never the server's."""

import os
import struct
import warnings
import zlib
from copy import copy
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from PIL import Image
from vllm.connections import HTTPResponseSizeExceededError
from vllm.exceptions import GracefulHTTPError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.image import ImageMediaIO

from ficoco_vllm.environment import ALLOW_PRIVATE_MEDIA, MAX_IMAGE_BYTES, MAX_PIXELS, MEDIA_CONNECTOR
from ficoco_vllm.hooks.wrapping import replace, wrap
from ficoco_vllm.server.media.fetching import connection_to

# Raised by Pillow's limit of pixels, by a file URL where no folder is allowed, and by Pillow's readers of broken files
# (beside OSError and ValueError). vLLM answers all of these with HTTP 500 or 501.
_CLIENT_ERRORS = (
    Image.DecompressionBombError,
    RuntimeError,
    SyntaxError,
    LookupError,
    EOFError,
    struct.error,
    zlib.error,
)
# A host that cannot be reached or does not answer.
_NETWORK_ERRORS = (aiohttp.ClientError, OSError, TimeoutError)


@MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)
class FicocoMediaConnector(MediaConnector):
    """vLLM's connector with the operator's limits: a medium that is too large or not allowed gets HTTP 400 or 413.

    It guards all kinds of media, since `ficoco-vllm serve` without our settings also serves models for video and audio.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Read the operator's limits; see vLLM's connector for the arguments."""
        super().__init__(*args, **kwargs)
        if limit := os.environ.get(MAX_PIXELS):
            # Pillow warns above this limit and refuses twice as many, both before it unpacks a pixel.
            replace(Image, "MAX_IMAGE_PIXELS", int(limit) // 2)
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        self.max_image_bytes = int(os.environ.get(MAX_IMAGE_BYTES, "0"))
        allow_private = os.environ.get(ALLOW_PRIVATE_MEDIA) == "1"
        self.connection = connection_to(tuple(self.allowed_media_domains), allow_private)

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        """Load one image.

        Args:
            image_url: URL in the request.
            image_mode: mode to convert to, None to keep it.

        Raises:
            VLLMValidationError: the image cannot be read, has too many pixels, or its URL is not allowed.
            VLLMUnprocessableEntityError: its host does not answer.
            GracefulHTTPError: it has too many bytes.
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

    def load_from_url(self, url: str, media_io: Any, **kwargs: Any) -> Any:
        """Load one medium of any kind.

        Args:
            url: URL in the request.
            media_io: vLLM's reader of this kind of medium.
            kwargs: arguments of vLLM's method.

        Raises:
            VLLMValidationError: the medium is on the network, and its address is not allowed.
            VLLMUnprocessableEntityError: its host does not answer.
            GracefulHTTPError: an image has too many bytes.
        """
        limited = self._check(url, media_io)
        try:
            return super().load_from_url(url, limited, **kwargs)
        except HTTPResponseSizeExceededError as error:
            raise self._too_large() from error
        except _NETWORK_ERRORS as error:
            raise _unreachable(url, error) from error

    async def load_from_url_async(self, url: str, media_io: Any, **kwargs: Any) -> Any:
        """Load one medium; see `load_from_url`."""
        limited = self._check(url, media_io)
        try:
            return await super().load_from_url_async(url, limited, **kwargs)
        except HTTPResponseSizeExceededError as error:
            raise self._too_large() from error
        except _NETWORK_ERRORS as error:
            raise _unreachable(url, error) from error

    def _check(self, url: str, media_io: Any) -> Any:
        """Refuse network URLs unless the operator names domains: clients must not reach the server's network.

        Returns:
            `media_io`, with the operator's size limit if it reads an image.
        """
        if url.lstrip()[:4].lower() == "http" and not self.allowed_media_domains:
            raise VLLMValidationError(
                "image_url: media are not fetched from the network; allowed: data URLs, or domains that the server "
                "was started with (--allowed-media-domains)",
                parameter="image_url",
            )
        if not self.max_image_bytes or not isinstance(media_io, ImageMediaIO):
            return media_io
        if url[:5].lower() == "data:" and 3 * len(url.partition(",")[2]) // 4 > self.max_image_bytes + 2:
            raise self._too_large()
        limited = copy(media_io)
        wrap(limited, "get_max_bytes", lambda _: self.max_image_bytes)
        return limited

    def _too_large(self) -> GracefulHTTPError:
        return GracefulHTTPError(
            f"image_url: the image is too large; allowed: up to {self.max_image_bytes} bytes "
            "(--ficoco-max-image-mb)",
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        )


def _refusal(error: Exception) -> VLLMValidationError:
    return VLLMValidationError(f"image_url: {error}", parameter="image_url")


def _unreachable(url: str, error: Exception) -> Exception:
    """Error of a fetch from the network; errors of other URLs stay as they are."""
    if url.lstrip()[:4].lower() != "http":
        return error
    why = str(error) or type(error).__name__
    unreachable: Exception = VLLMUnprocessableEntityError(
        f"image_url: {urlsplit(url).hostname} could not be fetched from: {why}", parameter="image_url"
    )
    return unreachable
