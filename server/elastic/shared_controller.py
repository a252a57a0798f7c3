"""One controller for all API server processes of a server, with its state in a folder that they share.

vLLM sends the statistics of a step to one of the API server processes only, so none sees them all.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ficoco_vllm.server.elastic.controller import Load, State, start, step
from ficoco_vllm.server.elastic.settings import ElasticSettings

# Time without a report after which an engine counts as idle, and a process as ended.
EXPIRY_SECONDS = 30.0


@dataclass(frozen=True)
class EngineReport:
    """Load of one engine at the end of a step.

    Attributes:
        time_seconds: time on the clock that all processes of a machine share.
        load: the engine's load, without preempted requests.
    """

    time_seconds: float
    load: Load


@dataclass
class Observations:
    """Observations of one process since its last update.

    Attributes:
        reports: latest report of each engine, by index.
        num_preempted: requests that lost their blocks.
        num_unfinished: requests of this process that are still open.
    """

    reports: dict[int, EngineReport] = field(default_factory=dict)
    num_preempted: int = 0
    num_unfinished: int = 0


@dataclass
class _Shared:
    """Content of the shared file.

    Attributes:
        servers: process to (time, unfinished requests).
    """

    state: State
    reports: dict[int, EngineReport] = field(default_factory=dict)
    num_preempted: int = 0
    servers: dict[int, tuple[float, int]] = field(default_factory=dict)

    def load(self) -> Load:
        """Load over all engines, from the reports of all processes."""
        if not any(num_unfinished for _, num_unfinished in self.servers.values()):
            # An idle engine makes no steps, so its last report may count requests that are gone.
            return Load()
        load = Load.of_engines([report.load for report in self.reports.values()])
        return replace(load, num_preempted=self.num_preempted)

    def expire(self, now_seconds: float) -> None:
        """Set engines without a recent report to idle, and remove processes without one."""
        oldest = now_seconds - EXPIRY_SECONDS
        for engine, report in self.reports.items():
            if report.time_seconds < oldest:
                self.reports[engine] = replace(report, load=Load())
        self.servers = {process: entry for process, entry in self.servers.items() if entry[0] >= oldest}


class SharedController:
    """The shared controller, as one process uses it."""

    def __init__(self, settings: ElasticSettings, folder: Path, process: int | None = None) -> None:
        """Use an existing folder. The first process to update starts the controller.

        Args:
            settings: settings of the controller, the same in every process.
            folder: folder of this server alone, empty when it starts.
            process: identifier of this process; None takes the operating system's.
        """
        self.settings = settings
        self._file = folder / "controller.json"
        self._lock = folder / "lock"
        self._process = os.getpid() if process is None else process

    def update(self, observations: Observations, now_seconds: float) -> tuple[State, Load] | None:
        """Add the observations of this process, and let the controller make one step.

        Args:
            observations: observations of this process.
            now_seconds: time on the clock that all processes of the machine share.

        Returns:
            The controller's state and its input; None if another process is updating: then nothing changes.
        """
        with self._locked() as acquired:
            if not acquired:
                return None
            shared = self._read(now_seconds)
            for engine, report in observations.reports.items():
                known = shared.reports.get(engine)
                if known is None or known.time_seconds < report.time_seconds:
                    shared.reports[engine] = report
            shared.num_preempted += observations.num_preempted
            shared.servers[self._process] = (now_seconds, observations.num_unfinished)
            shared.expire(now_seconds)
            load = shared.load()
            shared.state = step(self.settings, shared.state, load, now_seconds)
            shared.num_preempted = 0
            self._write(shared)
            return shared.state, load

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        # Never waits: a process that is suspended while it holds the lock must not stop the others.
        with self._lock.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _read(self, now_seconds: float) -> _Shared:
        try:
            values = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return _Shared(start(self.settings, now_seconds))
        state = {**values["state"], "hold_seconds": tuple(values["state"]["hold_seconds"])}
        return _Shared(
            State(**state),
            {int(engine): _report(report) for engine, report in values["reports"].items()},
            values["num_preempted"],
            {int(process): (time, count) for process, (time, count) in values["servers"].items()},
        )

    def _write(self, shared: _Shared) -> None:
        # Atomically: a process may end at any moment.
        draft = self._file.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(shared)), encoding="utf-8")
        draft.replace(self._file)


def _report(values: dict[str, Any]) -> EngineReport:
    return EngineReport(values["time_seconds"], Load(**values["load"]))
