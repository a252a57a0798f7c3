"""Models that these tests share."""

from pathlib import Path

import pytest

from tests.support.hugging_face import HfLlava
from tests.support.random_llava import build, build_next


@pytest.fixture(scope="package")
def random_hf(random_llava: Path) -> HfLlava:
    """Random weights, 576 visual tokens, three decoder layers."""
    return HfLlava(random_llava)


@pytest.fixture(scope="package")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with random weights, 144 visual tokens and eight decoder layers."""
    return build(tmp_path_factory.mktemp("small-hf"), patch_size=16, decoder_layers=8)


@pytest.fixture(scope="package")
def small_hf(small_folder: Path) -> HfLlava:
    """Its model."""
    return HfLlava(small_folder)


@pytest.fixture(scope="package")
def small_next_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-NeXT with random weights, 36 patches a tile, and eight decoder layers."""
    return build_next(tmp_path_factory.mktemp("small-next-hf"), tile_size=48, decoder_layers=8)


@pytest.fixture(scope="package")
def small_next(small_next_folder: Path) -> HfLlava:
    """Its model."""
    return HfLlava(small_next_folder)
