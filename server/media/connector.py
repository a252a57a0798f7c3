"""Image loader: a medium that cannot be loaded is the client's error, never the server's."""

import binascii
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from http import HTTPStatus
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import torch
from PIL import Image, UnidentifiedImageError
from vllm.connections import HTTPResponseSizeExceededError
from vllm.exceptions import GracefulHTTPError, VLLMError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.image import ImageMediaIO

from ficoco_vllm.environment import ALLOW_PRIVATE_MEDIA, MAX_IMAGE_BYTES, MAX_PIXELS, MEDIA_CONNECTOR
from ficoco_vllm.hooks.images import limit_bytes, limit_pixels
from ficoco_vllm.server.media.fetching import connection_to

# Raised for data that cannot be read: by vLLM's checks of URLs, by Pillow's limit of pixels, and by readers of broken
# files. vLLM answers those that are no ValueError with HTTP 500 or 501.
_UNREADABLE = (
    Image.DecompressionBombError,
    OSError,
    ValueError,
    RuntimeError,
    SyntaxError,
    LookupError,
    EOFError,
    UnpicklingError,
    struct.error,
    zlib.error,
)
# A host that cannot be reached or does not answer.
_NETWORK_ERRORS = (aiohttp.ClientError, OSError, TimeoutError)
# Media that were fetched from the network for the request in whose context this is set, so that a second answer to it
# asks no host again.
remembered: ContextVar[dict[Any, Any] | None] = ContextVar("ficoco_media", default=None)
# LLaVA's processor scales the shorter side up to the tower's before it crops: a thin line would become gigabytes.
MAX_ASPECT_RATIO = 200


@MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)
class FicocoMediaConnector(MediaConnector):
    """vLLM's connector with the operator's limits: a medium that is too large or not allowed gets HTTP 400 or 413.

    It guards all kinds of media, since `ficoco-vllm serve` without our settings also serves models for video and audio.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Read the operator's limits; see vLLM's connector for the arguments."""
        super().__init__(*args, **kwargs)
        if limit := os.environ.get(MAX_PIXELS):
            limit_pixels(int(limit))
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
            VLLMValidationError: the image cannot be read, has too many pixels or no usable shape, or its URL is not
                allowed.
            VLLMUnprocessableEntityError: its host does not answer.
            GracefulHTTPError: it has too many bytes.
        """
        return _checked(super().fetch_image(image_url, image_mode=image_mode))

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        """Load one image; see `fetch_image`."""
        return _checked(await super().fetch_image_async(image_url, image_mode=image_mode))

    def fetch_image_embedding(self, data: str) -> torch.Tensor:
        """Load the embeddings of one image.

        Args:
            data: base64 of a tensor.

        Raises:
            VLLMValidationError: it cannot be read.
        """
        with _embeddings_refused():
            embeddings: torch.Tensor = super().fetch_image_embedding(data)
        return embeddings

    async def fetch_image_embedding_async(self, data: str) -> torch.Tensor:
        """Load the embeddings of one image; see `fetch_image_embedding`."""
        with _embeddings_refused():
            embeddings: torch.Tensor = await super().fetch_image_embedding_async(data)
        return embeddings

    def load_from_url(self, url: str, media_io: Any, **kwargs: Any) -> Any:
        """Load one medium of any kind.

        Args:
            url: URL in the request.
            media_io: vLLM's reader of this kind of medium.
            kwargs: arguments of vLLM's method.

        Raises:
            VLLMValidationError: the medium cannot be read, or its address is not allowed.
            VLLMUnprocessableEntityError: its host does not answer.
            GracefulHTTPError: an image has too many bytes.
        """
        limited = self._check(url, media_io)
        with self._client_errors(url):
            return super().load_from_url(url, limited, **kwargs)

    async def load_from_url_async(self, url: str, media_io: Any, **kwargs: Any) -> Any:
        """Load one medium; see `load_from_url`."""
        known, key = remembered.get(), (url, type(media_io))
        if known is not None and key in known:
            return known[key]
        limited = self._check(url, media_io)
        with self._client_errors(url):
            medium = await super().load_from_url_async(url, limited, **kwargs)
        if known is not None and _is_network(url):
            known[key] = medium
        return medium

    @contextmanager
    def _client_errors(self, url: str) -> Iterator[None]:
        """Turn every error of loading a medium into one that vLLM answers with 4xx."""
        try:
            yield
        except HTTPResponseSizeExceededError as error:
            raise self._too_large() from error
        except VLLMError:
            raise
        except (*_NETWORK_ERRORS, *_UNREADABLE) as error:
            if _is_network(url) and isinstance(error, _NETWORK_ERRORS):
                raise _unreachable(url, error) from error
            raise _refusal("image_url", _why(error)) from error

    def _check(self, url: str, media_io: Any) -> Any:
        """Refuse network URLs unless the operator names domains: clients must not reach the server's network.

        Returns:
            `media_io`, with the operator's size limit if it reads an image.
        """
        if _is_network(url) and not self.allowed_media_domains:
            raise VLLMValidationError(
                "image_url: media are not fetched from the network; allowed: data URLs, or domains that the server "
                "was started with (--allowed-media-domains)",
                parameter="image_url",
            )
        if not self.max_image_bytes or not isinstance(media_io, ImageMediaIO):
            return media_io
        if url[:5].lower() == "data:" and 3 * len(url.partition(",")[2]) // 4 > self.max_image_bytes + 2:
            raise self._too_large()
        return limit_bytes(media_io, self.max_image_bytes)

    def _too_large(self) -> GracefulHTTPError:
        return GracefulHTTPError(
            f"image_url: the image is too large; allowed: up to {self.max_image_bytes} bytes "
            "(--ficoco-max-image-mb)",
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        )


def _is_network(url: str) -> bool:
    return url.lstrip()[:4].lower() == "http"


def _checked(image: Image.Image) -> Image.Image:
    """The image, unless its shape is unusable.

    Raises:
        VLLMValidationError: a side is empty, or too long for the other one.
    """
    width, height = image.size
    if min(width, height) * MAX_ASPECT_RATIO < max(width, height) or min(width, height) == 0:
        raise _refusal(
            "image_url",
            f"an image of {width} x {height} pixels is not allowed; allowed: sides of at least one pixel, the longer "
            f"one up to {MAX_ASPECT_RATIO} times the shorter one",
        )
    return image


@contextmanager
def _embeddings_refused() -> Iterator[None]:
    try:
        yield
    except VLLMError:
        raise
    except _UNREADABLE as error:
        why = "the data cannot be read; allowed: base64 of a tensor as torch.save or numpy.save writes it"
        raise _refusal("image_embeds", why) from error


def _refusal(field: str, why: str) -> VLLMValidationError:
    return VLLMValidationError(f"{field}: {why}", parameter=field)


def _why(error: Exception) -> str:
    """Readable reason why a medium cannot be read."""
    for cause in (error, error.__cause__):
        if isinstance(cause, UnidentifiedImageError):
            return (
                "the data are not an image; allowed: PNG, JPEG, WebP, GIF and other formats that Pillow reads"
            )
    if isinstance(error, binascii.Error):
        return f"the data URL is not valid base64 ({error})"
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, IsADirectoryError):
        return "the URL names a folder; allowed: a file"
    if isinstance(error, OSError):
        return f"the file cannot be read ({error.strerror or type(error).__name__})"
    return str(error) or f"the data cannot be read ({type(error).__name__})"


def _unreachable(url: str, error: Exception) -> VLLMUnprocessableEntityError:
    why = str(error) or type(error).__name__
    host = urlsplit(url).hostname
    return VLLMUnprocessableEntityError(
        f"image_url: {host} could not be fetched from: {why}", parameter="image_url"
    )
