"""Engines that the tests of the served tower share, each with the oracle on the same weights."""

from pathlib import Path

import pytest
from vllm import LLM

from tests.reference.algorithm1 import ReferenceLlava
from tests.support.engine import Engines

Pair = tuple[LLM, ReferenceLlava]


def _pair(engines: Engines, folder: Path) -> Pair:
    return engines.get(folder, {"method": "ficoco-v", "keep": 64, "explain": True}), ReferenceLlava(folder)


@pytest.fixture(scope="package")
def random_pair(engines: Engines, random_llava: Path) -> Pair:
    """Random weights."""
    return _pair(engines, random_llava)


@pytest.fixture(scope="package")
def demo_pair(engines: Engines, demo_model: Path) -> Pair:
    """Trained weights."""
    return _pair(engines, demo_model)
