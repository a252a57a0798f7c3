"""Engines on a CPU that capture CUDA graphs as on a GPU; `tests.support.graphs` stands in for the graphs.

vLLM's own code chooses what is captured, prepares each step and decides which graph replays it. What says that a CPU
has no graphs is overridden, and the attention has operators that can be captured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ficoco_vllm.benchmarks.harness.engine import worker_of
from tests.support import graphs

# A process that is to find Triton's interpreter must not import vLLM before.
if TYPE_CHECKING:
    from vllm import LLM


def emulate() -> None:
    """Prepare this process for engines that capture graphs, before the first one starts."""
    from vllm.compilation import cuda_graph
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    from ficoco_vllm.decoder import decoder

    check, warm_up = CpuPlatform.check_and_update_config, CPUWorker.compile_or_warm_up_model

    def keep_graphs(vllm_config: Any) -> None:
        """All but what a CPU's platform changes about compilation."""
        kept = dict(vars(vllm_config.compilation_config))
        check(vllm_config)
        vars(vllm_config.compilation_config).update(kept)

    def warm_up_and_capture(worker: Any) -> Any:
        times = warm_up(worker)
        if worker.model_runner.needs_cudagraph_capture():
            worker.model_runner.capture_model()
        return times

    replaced: dict[Any, dict[str, Any]] = {
        CpuPlatform: {
            "check_and_update_config": keep_graphs,
            "support_static_graph_mode": lambda: True,
            "get_static_graph_wrapper_cls": lambda: "vllm.compilation.cuda_graph.CUDAGraphWrapper",
            "graph_pool_handle": lambda: (0, 0),
            "get_attn_backend_cls": lambda *_, **__: "tests.support.paged_attention.PagedBackend",
        },
        # Streams and memory of a device.
        cudagraph_utils: {"graph_capture": lambda device: nullcontext(), "current_stream": lambda: None},
        model_runner: {"lock_workspace": lambda: None},
        cuda_graph: {"current_stream": lambda: None, "weak_ref_tensors": lambda tensors: tensors},
        torch.accelerator: {
            "empty_cache": lambda: None,
            "synchronize": lambda: None,
            "get_memory_info": lambda: (0, 0),
        },
        # Steps that reduce run outside of graphs; `test_workers` compiles their segments.
        decoder: {"compile_unit": lambda segment, index: segment},
    }
    for where, names in replaced.items():
        for name, value in names.items():
            setattr(where, name, staticmethod(value) if where is CpuPlatform else value)
    setattr(CPUWorker, warm_up.__name__, warm_up_and_capture)
    graphs.install(setattr)


@dataclass(frozen=True)
class Step:
    """How a step ran.

    Attributes:
        mode: of its graphs, "NONE" without.
        num_reqs: requests.
        num_padded_reqs: the same with those that fill up a graph.
        num_tokens: rows.
        num_padded_tokens: the same with those that fill up a graph.
        reduces: whether a prompt is reduced.
    """

    mode: str
    num_reqs: int
    num_padded_reqs: int
    num_tokens: int
    num_padded_tokens: int
    reduces: bool


def noting_steps(engine: "LLM", send: Callable[..., Any], *args: Any) -> tuple[Any, list[Step], int]:
    """Call `send(engine, *args)`.

    Returns:
        Its result, the steps, and the number of replayed graphs.
    """
    state = worker_of(engine).model_runner.model_state
    original, steps, before = state.prepare_attn, [], graphs.Graph.replays

    def noted(batch: Any, mode: Any, *rest: Any, **more: Any) -> Any:
        metadata = original(batch, mode, *rest, **more)
        counts = (
            batch.num_reqs,
            batch.num_reqs_after_padding,
            batch.num_tokens,
            batch.num_tokens_after_padding,
        )
        steps.append(Step(mode.name, *counts, state.step is not None))
        return metadata

    state.prepare_attn = noted
    try:
        return send(engine, *args), steps, graphs.Graph.replays - before
    finally:
        del state.prepare_attn


@contextmanager
def captured_again(engine: "LLM") -> Iterator[None]:
    """Capture what the block replays, and once more after it."""
    _capture(engine)
    try:
        yield
    finally:
        _capture(engine)


def _capture(engine: "LLM") -> None:
    runner = worker_of(engine).model_runner
    runner.cudagraph_manager.release_graphs()
    runner.capture_model()


def num_graphs(engine: "LLM") -> int:
    """Graphs of whole decoding steps."""
    return len(worker_of(engine).model_runner.cudagraph_manager.graphs)
