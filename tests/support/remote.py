"""Engines in another process, since reducing in the decoder needs another environment."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ficoco_vllm.benchmarks.harness import engine as harness
from ficoco_vllm.config import FicocoConfig

if TYPE_CHECKING:
    from tests.support.engine import Engines

# Model runner V2 through Triton's interpreter on every machine; read before vLLM is imported.
ENVIRONMENT = harness.INTERPRETER


class Remote:
    """One engine of a `Host`.

    Attributes:
        held: the engines of its process.
        kind: model, settings and options of this one.
    """

    def __init__(self, held: harness.Remote, *kind: Any) -> None:
        self.held, self.kind = held, kind

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(engine, *args)` there and return its result.

        Raises:
            RuntimeError: with the traceback of the other side.
        """
        return self.held.call(_call, self.kind, function, args)


class Host:
    """A process that holds one engine of each kind, so that vLLM is imported once for all of them."""

    def __init__(self, held: harness.Remote) -> None:
        self.held = held

    def get(self, model: Path, ficoco: dict[str, Any], **options: Any) -> Remote:
        """The engine of this kind, started at the first call; arguments as of `make_engine`.

        Prompts decide as a whole and by published counts, unless the settings name windows.
        """
        if FicocoConfig.parse(ficoco).decoder_method is not None:
            ficoco = {"windows": "off", **ficoco}
        remote = Remote(self.held, model, ficoco, options)
        remote.call(_nothing)
        return remote


def without_amx() -> None:
    """Let vLLM multiply by 8-bit weights as on CPUs without AMX: its product for those with it takes no float32.

    Here, as a process that is to find Triton's interpreter must not import vLLM before.
    """
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    cpu.check_cpu_sgl_kernel = lambda *_: False


@contextmanager
def run_host(
    environment: dict[str, str] | None = None, prepare: Callable[[], None] | None = None
) -> Iterator[Host]:
    """Run a process for engines; it ends with the block.

    Args:
        environment: variables beside those of this process.
        prepare: called there first.
    """
    with harness.remote(_engines, {**ENVIRONMENT, **(environment or {})}, prepare) as held:
        yield Host(held)


@contextmanager
def remote_engine(
    model: Path,
    ficoco: dict[str, Any],
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    **options: Any,
) -> Iterator[Remote]:
    """Start an engine in a process of its own; arguments as of `run_host` and `make_engine`."""
    with run_host(environment, prepare) as host:
        yield host.get(model, ficoco, **options)


def _engines() -> "AbstractContextManager[Engines]":
    from tests.support.engine import Engines

    return Engines()


def _call(engines: "Engines", kind: tuple[Any, ...], function: Callable[..., Any], args: Any) -> Any:
    model, ficoco, options = kind
    return function(engines.get(model, ficoco, **options), *args)


def _nothing(_: Any) -> None:
    """Called to start an engine."""
