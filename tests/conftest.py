"""Settings of vLLM for tests, and the models that they share."""

import os

# Read by vLLM at import. The engine lives in this process, so that its KV manager can be looked at.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from openai import OpenAI
from PIL import Image

from tests.support.server import API_KEY, DEMO_KEEP, Server, serve


@pytest.fixture(scope="session")
def random_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with random weights, 576 visual tokens."""
    from tests.support.random_llava import build

    return build(tmp_path_factory.mktemp("random-llava"))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The model that ships with the package."""
    from ficoco_vllm.demo_model import path

    return path()


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Eight different images, not all square."""
    sizes = [(192, 192), (300, 200), (64, 64), (192, 400), (192, 192), (500, 500), (193, 191), (224, 224)]
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes
    ]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model as `make serve` serves it, with budgets of their own allowed to requests."""
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["--ficoco-method", "ficoco-v", "--ficoco-keep", str(DEMO_KEEP), "--trust-request-mm-kwargs"]
    arguments += ["--api-key", API_KEY, "--ficoco-explain", "--ficoco-explain-rate", "0"]
    with serve(log, *arguments) as server:
        yield server


@pytest.fixture
def client(server: Server) -> OpenAI:
    """The official client of that server."""
    return server.client()
