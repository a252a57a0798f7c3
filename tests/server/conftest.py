"""One server for all tests of this folder."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.support.server import Server, serve

KEEP = 64


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model as `make serve` serves it, with budgets of their own allowed to requests."""
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["--ficoco-method", "ficoco-v", "--ficoco-keep", str(KEEP), "--trust-request-mm-kwargs"]
    with serve(log, *arguments) as server:
        yield server


@pytest.fixture
def client(server: Server) -> OpenAI:
    """The official client of that server."""
    return server.client()
