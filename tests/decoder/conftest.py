"""The model of these tests: 144 visual tokens, eight decoder layers."""

from pathlib import Path

import pytest

from tests.support.random_llava import build


@pytest.fixture(scope="session")
def small_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; small enough for references that take one token after the other."""
    return build(tmp_path_factory.mktemp("small-llava"), patch_size=16, decoder_layers=8)
