"""Settings of vLLM for tests, and the models that they share."""

import fcntl
import os
import sys
import tempfile

# Read by vLLM at import. The engine lives in this process, so that its KV manager can be looked at.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several engines would spin while they wait for each other. Workers inherit the setting.
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ficoco_vllm.compat import INTERPRETER_FOLDER

# The tests of kernels run where torch and Triton are installed and nothing else: the rest is imported by the fixtures.
if TYPE_CHECKING:
    from openai import OpenAI
    from PIL import Image

    from tests.support.engine import Engines
    from tests.support.release import Release
    from tests.support.remote import Host
    from tests.support.server import Server

# Reasons of the marker `needs` that hold here.
MISSING = pytest.StashKey[set[str]]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let tests marked `alone` run while no other worker's test does. A waiting test is not overtaken."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    folder = Path(tempfile.gettempdir())
    with (folder / f"{run}.turn").open("w") as turn, (folder / f"{run}.tests").open("w") as tests:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(tests, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(turn, fcntl.LOCK_UN)
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests whose tools are missing."""
    needs = {item: [mark for mark in item.iter_markers("needs") if not mark.args[0]] for item in items}
    missing = {mark.args[1] for marks in needs.values() for mark in marks}
    config.stash[MISSING] |= missing
    config.hook.pytest_deselected(items=[item for item in items if needs[item]])
    items[:] = [item for item in items if not needs[item]]


def pytest_configure(config: pytest.Config) -> None:
    """Create the set that `pytest_terminal_summary` reads."""
    config.stash[MISSING] = set()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send what is missing from a worker to the controller."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["missing"] = sorted(session.config.stash[MISSING])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect what a worker lacks."""
    node.config.stash[MISSING] |= set(getattr(node, "workeroutput", {}).get("missing", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name the tools whose tests were left out."""
    for reason in sorted(config.stash[MISSING]):
        terminalreporter.write_line(f"left out: {reason}")


@pytest.fixture(autouse=True, scope="module")
def interpreter_stays_hidden() -> Iterator[None]:
    """Fail a module that leaves Triton's backend `cpu` on the path: every later engine would run model runner V2."""
    before = list(sys.path)
    yield
    left = [folder for folder in sys.path if folder not in before and folder.endswith(INTERPRETER_FOLDER)]
    sys.path[:] = [folder for folder in sys.path if folder not in left]
    assert not left


@pytest.fixture(scope="session")
def random_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with random weights, 576 visual tokens."""
    from tests.support.random_llava import build

    return build(tmp_path_factory.mktemp("random-llava"))


@pytest.fixture(scope="session")
def random_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-NeXT with random weights, 144 visual tokens in each of up to five tiles."""
    from tests.support.random_llava import build_next

    return build_next(tmp_path_factory.mktemp("random-next"))


@pytest.fixture(scope="session")
def random_internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An InternVL with random weights, 36 visual tokens in each of up to seven tiles."""
    from tests.support.random_internvl import build

    return build(tmp_path_factory.mktemp("random-internvl"))


@pytest.fixture(scope="session")
def random_internvl_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in OpenGVLab's own format."""
    from tests.support.random_internvl_chat import build

    return build(tmp_path_factory.mktemp("random-internvl-chat"))


@pytest.fixture(scope="session")
def random_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL with random weights, 4 to 160 units an image."""
    from tests.support.random_qwen import build

    return build(tmp_path_factory.mktemp("random-qwen"))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The model that ships with the package."""
    from ficoco_vllm.demo_model import path

    return path()


@pytest.fixture(
    scope="module",
    params=(
        pytest.param(
            "int8",
            marks=pytest.mark.needs(
                torch.cuda.is_available() or torch.cpu._is_vnni_supported(),
                "8-bit weights: oneDNN's products saturate on a CPU without VNNI",
            ),
        ),
        pytest.param(
            "int4",
            marks=(
                pytest.mark.long,
                pytest.mark.needs(
                    torch.cuda.is_available() or torch.cpu._is_avx512_supported(),
                    "4-bit weights: vLLM's product needs a CPU with AVX-512",
                ),
            ),
        ),
    ),
)
def kind(request: pytest.FixtureRequest) -> str:
    """Scheme of quantized weights: W8A8 with a scale for each channel and token; W4A16 in groups of 32."""
    return str(request.param)


@pytest.fixture(scope="session")
def images() -> "list[Image.Image]":
    """Eight different images, not all square."""
    from tests.support.pictures import noise

    sizes = [(192, 192), (300, 200), (64, 64), (192, 400), (192, 192), (500, 500), (193, 191), (224, 224)]
    return noise(sizes, seed=0)


@pytest.fixture(scope="session")
def engines() -> "Iterator[Engines]":
    """Engines of this process, one of each kind, which reduce in the tower."""
    from tests.support.engine import Engines

    with Engines() as engines:
        yield engines


@pytest.fixture(scope="session")
def host() -> "Iterator[Host]":
    """Engines that reduce in the decoder, one of each kind, in a process with Triton's interpreter."""
    from tests.support.remote import run_host

    with run_host() as host:
        yield host


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Server]":
    """The demo model as `make serve` serves it; requests may also name a budget in `mm_processor_kwargs`."""
    from tests.support.server import DEMO_ARGUMENTS, serve

    with serve(tmp_path_factory.mktemp("server") / "log", *DEMO_ARGUMENTS, verbose=False) as server:
        yield server


@pytest.fixture
def client(server: "Server") -> "Iterator[OpenAI]":
    """The official client of that server, closed at the end: an open connection would warn when it is collected."""
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> "Release":
    """Wheel and sdist of these sources."""
    from tests.support.release import build

    return build(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="session")
def installed(release: "Release", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel and not the repository."""
    from tests.support.release import install

    return install(release.wheel, tmp_path_factory.mktemp("installed") / "venv")
