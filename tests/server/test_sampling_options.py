"""Every sampling option through a server whose tower reduces."""

import pytest
from PIL import Image

from tests.support.sampling_options import check_sweep
from tests.support.server import Server

pytestmark = [pytest.mark.compat, pytest.mark.server]


def test_no_option_ends_the_engine(server: Server, images: list[Image.Image]) -> None:
    check_sweep(server, "ficoco-demo", "chat/completions", images[0])
