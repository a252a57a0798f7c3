"""Time of work on a device, measured without waiting for it."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Observe = Callable[[str, float], None]


class Lap:
    """Intervals of work that are reported as one sum."""

    def __init__(self, label: str, on_cuda: bool) -> None:
        self.label = label
        self.on_cuda = on_cuda
        self.seconds = 0.0
        self.events: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of the block."""
        if self.on_cuda:
            make_event: Any = torch.cuda.Event  # not annotated by torch
            start, end = make_event(enable_timing=True), make_event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.events.append((start, end))
        else:
            start_seconds = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start_seconds

    def finished(self) -> bool:
        """Whether the device has finished the work."""
        return all(end.query() for _, end in self.events)

    def total_seconds(self) -> float:
        """The sum; only once it is finished."""
        milliseconds = [float(start.elapsed_time(end)) for start, end in self.events]
        return self.seconds + sum(milliseconds) / 1e3


class Stopwatch:
    """Makes laps and reports them once they are finished.

    On the CPU a lap is finished immediately. On CUDA it is a pair of events in the stream, reported when a later lap is
    handed in and the events have passed, so nothing ever waits for the device.
    """

    def __init__(self, observe: Observe) -> None:
        """Start without laps.

        Args:
            observe: called with the label and the seconds of each lap.
        """
        self.observe = observe
        self.pending: deque[Lap] = deque()

    def lap(self, label: str, device: torch.device) -> Lap:
        """A new lap.

        Args:
            label: handed to `observe`.
            device: device that does the work.
        """
        return Lap(label, device.type == "cuda")

    def hand_in(self, lap: Lap) -> None:
        """Report this lap and earlier ones, up to the first unfinished one."""
        self.pending.append(lap)
        while self.pending and self.pending[0].finished():
            done = self.pending.popleft()
            self.observe(done.label, done.total_seconds())
