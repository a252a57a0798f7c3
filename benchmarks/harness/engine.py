"""vLLM engines, in this process or in a separate one that answers calls.

Nothing heavy is imported at the top: a process that uses Triton's interpreter sets it up before it imports vLLM.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

import numpy as np
from PIL import Image

from ficoco_vllm.compat import hook_interpreter, is_cpu_build
from ficoco_vllm.config import FicocoConfig

if TYPE_CHECKING:
    from vllm import LLM

# The engine in the calling process, which can read its parts; None removes a variable.
IN_PROCESS: Mapping[str, str | None] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": None,  # overrides `kv_cache_memory_bytes`
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
# Model runner V2, which methods of the decoder need, without a GPU.
INTERPRETER = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
# Freed memory stays with the process, as with tcmalloc, which vLLM preloads where it is bundled. Else, on some
# machines, engines spend half of their time on getting the same pages again.
_KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
DECODE_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
# Threads may start processes at the same time, but all of them inherit one environment.
_STARTING = Lock()
TEXT = "what number is on the red sign? "


def make_engine(model: Path | str, ficoco: Mapping[str, Any] | None = None, **options: Any) -> "LLM":
    """Start an engine in this process: float32, and small enough that several fit into one process.

    `ficoco` are our settings, None for vLLM alone; `options` change the defaults of the engine.
    """
    from vllm import LLM

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 16,
        "max_logprobs": -1,
        "limit_mm_per_prompt": {"image": 2},
        "seed": 0,
        "disable_log_stats": True,
    }
    settings = {"ficoco": dict(ficoco)} if ficoco else {}
    return LLM(str(model), additional_config=settings, **(defaults | options))


@contextmanager
def running_engine(
    model: Path | str, ficoco: Mapping[str, Any] | None = None, **options: Any
) -> Iterator["LLM"]:
    """An engine in this process that is shut down with the block; see `make_engine` for the arguments."""
    engine = make_engine(model, ficoco, **options)
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()


class Remote:
    """An object in a process of its own, usually an engine."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(object, *args)` in its process and return the result.

        Raises:
            RuntimeError: with the traceback of the other process, or because that ended.
        """
        self._pipe.send((function, args))
        return self.receive()

    def receive(self) -> Any:
        """The result of the last call, or None once the process has started; see `call` for errors."""
        try:
            succeeded, value = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(
                "the process ended without an answer; the system may be out of memory"
            ) from error
        if not succeeded:
            raise RuntimeError(value)
        return value


@contextmanager
def remote(
    make: Callable[[], AbstractContextManager[Any]],
    environment: Mapping[str, str | None],
    prepare: Callable[[], None] | None = None,
) -> Iterator[Remote]:
    """A process that calls `prepare` and holds the object that `make` opens; both end with the block.

    Its environment is this process's with some variables added, or removed by None.

    Raises:
        RuntimeError: the object cannot be opened.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, prepare))
    with _environment(environment):
        process.start()
    there.close()
    held = Remote(here)
    try:
        held.receive()
        yield held
    finally:
        here.close()
        process.join(60)
        process.terminate()  # unless it has ended
        process.join()


def remote_engine(
    model: Path | str,
    ficoco: Mapping[str, Any] | None,
    environment: Mapping[str, str | None],
    prepare: Callable[[], None] | None = None,
    **options: Any,
) -> AbstractContextManager[Remote]:
    """An engine in a process of its own; see `remote` and `make_engine` for the arguments."""
    return remote(partial(running_engine, str(model), ficoco, **options), environment, prepare)


def bench_engine(
    model: Path | str,
    ficoco: Mapping[str, Any] | None,
    runner: Literal["V2"] | None = None,
    /,
    **options: Any,
) -> AbstractContextManager[Remote]:
    """An engine of a benchmark: bfloat16, weights made up, a process of its own; stock vLLM where `ficoco` is None.

    On a GPU all engines run model runner V2, which methods of the decoder need, and decode in CUDA graphs: what is
    compared differs in the method alone. On a CPU only methods of the decoder run V2, with our kernels for it; stock
    vLLM does with `runner="V2"`.
    """
    environment: dict[str, str | None] = {**IN_PROCESS, **_KEPT_MEMORY}
    defaults: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "limit_mm_per_prompt": {"image": 1},
    }
    if ficoco is None:
        environment["VLLM_PLUGINS"] = ""
    if not is_cpu_build():
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        defaults |= {"enforce_eager": False, "compilation_config": DECODE_GRAPHS}
    elif runner or FicocoConfig.parse(dict(ficoco or {})).decoder_method is not None:
        environment |= INTERPRETER
    return remote_engine(
        model, ficoco, environment, _hook_kernels if runner else None, **(defaults | options)
    )


def _hook_kernels() -> None:
    from ficoco_vllm.hooks.kernels import hook_kernels

    hook_kernels()


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Environment and search path of a process that starts within the block, which takes both from this one."""
    added = {name: value for name, value in values.items() if value is not None}
    with _STARTING, patch.dict(os.environ, added), patch.object(sys, "path", list(sys.path)):
        for name in values.keys() - added:
            os.environ.pop(name, None)
        hook_interpreter()
        yield


def _serve(
    pipe: Connection, make: Callable[[], AbstractContextManager[Any]], prepare: Callable[[], None] | None
) -> None:
    hook_interpreter()
    with ExitStack() as stack:
        try:
            if prepare is not None:
                prepare()
            held = stack.enter_context(make())
        except Exception:
            pipe.send((False, traceback.format_exc()))
            return
        pipe.send((True, None))
        with suppress(EOFError):
            while True:
                function, args = pipe.recv()
                try:
                    pipe.send((True, function(held, *args)))
                except Exception:
                    pipe.send((False, traceback.format_exc()))


def request(prompt: str | list[int], images: Sequence[Image.Image] = (), **kwargs: Any) -> dict[str, Any]:
    """One prompt as vLLM takes it: text, or tokens with one for each image; `kwargs` are its `mm_processor_kwargs`."""
    body: dict[str, Any] = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
    if images:
        body["multi_modal_data"] = {"image": list(images)}
    if kwargs:
        body["mm_processor_kwargs"] = kwargs
    return body


def image_request(
    engine: "LLM",
    num_text_tokens: int,
    seed: int,
    side: int = 336,
    image: Sequence[str] = ("<image>",),
    /,
    **kwargs: Any,
) -> dict[str, Any]:
    """A prompt of one random image and of text; the tokens `image` stand for it, `kwargs` are as of `request`."""
    tokenizer: Any = engine.get_tokenizer()
    prompt = [*map(tokenizer.convert_tokens_to_ids, image), *text_tokens(engine, num_text_tokens)]
    return request(prompt, [random_image(seed, side)], **kwargs)


def text_tokens(engine: "LLM", num_tokens: int, text: str = TEXT) -> list[int]:
    """A text, repeated up to a number of tokens."""
    tokenizer: Any = engine.get_tokenizer()
    return list(tokenizer(text * num_tokens, add_special_tokens=False).input_ids[:num_tokens])


def random_image(seed: int, side: int = 336) -> Image.Image:
    """A square of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def scheduler_of(engine: "LLM") -> Any:
    """The scheduler of an engine in this process."""
    return _core(engine).scheduler


def worker_of(engine: "LLM") -> Any:
    """The worker of an engine in this process."""
    worker = _core(engine).model_executor.driver_worker
    return getattr(worker, "worker", worker)


def _core(engine: Any) -> Any:
    return engine.llm_engine.engine_core.engine_core


def phase_of(request: Any) -> str:
    """Phase of a request of the scheduler; "ended" for None."""
    from vllm.v1.request import RequestStatus

    if request is None:
        return "ended"
    if request.status == RequestStatus.PREEMPTED:
        return "preempted"
    if request.status != RequestStatus.RUNNING:
        return "waiting"
    return "decoding" if request.num_output_tokens else "prefilled"
