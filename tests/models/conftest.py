"""Engines that the tests of the served tower share, each beside the oracle on the same weights."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from tests.reference.algorithm1 import ReferenceLlava
from tests.support.engine import make_engine

Pair = tuple[LLM, ReferenceLlava]


def _pair(folder: Path) -> Iterator[Pair]:
    engine = make_engine(folder, {"method": "ficoco-v", "keep": 64, "explain": True})
    yield engine, ReferenceLlava(folder)
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="package")
def random_pair(random_llava: Path) -> Iterator[Pair]:
    """Random weights."""
    yield from _pair(random_llava)


@pytest.fixture(scope="package")
def demo_pair(demo_model: Path) -> Iterator[Pair]:
    """Trained weights."""
    yield from _pair(demo_model)
