"""The model of these tests: 144 visual tokens, eight decoder layers."""

from pathlib import Path

import pytest

from tests.support.random_llava import build
from tests.support.remote import Host, Remote


@pytest.fixture(scope="session")
def small_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; small enough for references that take one token after the other."""
    return build(tmp_path_factory.mktemp("small-llava"), patch_size=16, decoder_layers=8)


@pytest.fixture
def small_engine(host: Host, small_llava: Path) -> Remote:
    """FiCoCo-L with 16 tokens, eight segments and traces: the default engine of the tests."""
    return host.get(small_llava, {"method": "ficoco-l", "keep": 16, "explain": True}, block_size=32)
