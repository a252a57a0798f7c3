"""Servers that several files of these tests share."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.support.random_llava import build
from tests.support.server import API_KEY, DTYPE, Server, serve
from tests.support.site import Site, loopback_site

# Visual tokens of an image, and the budget of the server `bounded`.
NUM_PATCHES, KEEP = 144, 15
# Named by the operator, so it is allowed; the address of `localhost` is not.
SITE = "127.0.0.2"
IMAGE_BYTES, BODY_BYTES, PIXELS = 2**20, 4 * 2**20, 10**6


@dataclass(frozen=True)
class Bounded:
    """A server with tight limits.

    Attributes:
        server: the decoder reduces, by `ficoco-l`.
        site: media may be fetched from its address, and from `localhost`.
        folder: of files that may be named; beside it lies `secret.png`.
    """

    server: Server
    site: Site
    folder: Path


@pytest.fixture(scope="session")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bounded]:
    """The decoder alone, with every limit that an operator can set."""
    folder = tmp_path_factory.mktemp("bounded")
    model, media = build(folder / "model", patch_size=16, decoder_layers=8), folder / "media"
    media.mkdir()
    Image.new("RGB", (64, 64), (200, 10, 10)).save(media / "image.png")
    Image.new("RGB", (64, 64)).save(folder / "secret.png")
    (media / "link.png").symlink_to(folder / "secret.png")
    arguments = ["--ficoco-method", "ficoco-l", "--ficoco-keep", str(KEEP), "--served-model-name", "small"]
    arguments += ["--ficoco-min-keep", "4", "--ficoco-allow-methods", "ficoco-l,fastv"]
    # Published counts, and every request computes its prompt.
    arguments += ["--ficoco-config", '{"windows": "off"}']
    arguments += ["--ficoco-explain", "--ficoco-explain-rate", "3", "--api-key", API_KEY]
    arguments += [
        "--allowed-media-domains",
        SITE,
        "localhost",
        "--allowed-local-media-path",
        str(media),
    ]
    arguments += ["--ficoco-max-image-mb", "1", "--ficoco-max-body-mb", "4"]
    arguments += ["--ficoco-max-image-pixels", str(PIXELS), "--limit-mm-per-prompt", '{"image": 2}']
    arguments += ["--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(2**26)]
    # Few requests run at the same time, so that the burst of the soak queues on every machine.
    arguments += ["--dtype", DTYPE, "--max-num-seqs", "8"]
    with (
        loopback_site(SITE) as site,
        serve(folder / "log", str(model), *arguments, "--enable-scale-out") as server,
    ):
        yield Bounded(server, site, media)
