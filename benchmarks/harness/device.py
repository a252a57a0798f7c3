"""Time on the device: spans of work, and what it reaches at most in products, copies and launches."""

import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch.utils import mkldnn

from ficoco_vllm.reduction.cost import Device

REPEATS = 7


def measure(dtype: torch.dtype = torch.bfloat16, where: str | None = None) -> Device:
    """The ceilings, for products of a data type, in a second or two; `where="cpu"` ignores a GPU."""
    where = where or name()
    flops, bandwidth = _flops(dtype, where), _bandwidth(where)
    if where == "cpu":
        memory = float(psutil.virtual_memory().total)
        return Device("cpu", flops, bandwidth, memory, 0.0, "measured here")
    torch.cuda.empty_cache()  # an engine takes a share of all the memory
    gpu = torch.cuda.get_device_properties(0)
    return Device(gpu.name, flops, bandwidth, float(gpu.total_memory), _launch_seconds(), "measured here")


def name() -> str:
    """The device that torch computes on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _flops(dtype: torch.dtype, where: str) -> float:
    side = 8192 if where == "cuda" else 2048
    a, b = torch.randn((2, side, side), device=where).to(dtype)
    products: list[Callable[[], object]] = [lambda: a @ b]
    if where == "cpu" and dtype == torch.float32:
        # vLLM's layers multiply by oneDNN's packed weights; torch multiplies by MKL, half as fast on some CPUs.
        pack: Callable[..., Any] = mkldnn.to_mkldnn  # not annotated by torch
        layer, rows = pack(torch.nn.Linear(side, side, bias=False)), a.to_mkldnn()
        products.append(lambda: layer(rows))
    return 2 * side**3 / min(map(_seconds, products))


def _bandwidth(where: str) -> float:
    num_bytes = 2**31 if where == "cuda" else 2**28
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    return 2 * num_bytes / _seconds(lambda: target.copy_(source))


def _launch_seconds(count: int = 1000) -> float:
    small = torch.zeros(1, device=name())

    def launch() -> None:
        for _ in range(count):
            small.add_(1)

    return _seconds(launch) / count


def _seconds(call: Callable[[], object]) -> float:
    """Shortest of several calls, the first of which warms up."""

    def finished() -> None:
        call()
        synchronise()

    return min(timeit.repeat(finished, number=1, repeat=REPEATS + 1))


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def span() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds of the block's work; on a GPU, call it once that work is finished."""
    if torch.cuda.is_available():
        event: Any = torch.cuda.Event  # not annotated by torch
        first, last = event(enable_timing=True), event(enable_timing=True)
        first.record()
        yield lambda: first.elapsed_time(last) / 1e3
        last.record()
        return
    begin, ends = time.perf_counter(), list[float]()
    yield lambda: ends[0] - begin
    ends.append(time.perf_counter())
