"""One controller for all API server processes: its state and what they know lie in a folder that they share.

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

# From then on an engine is taken for idle, and a process for ended.
GONE_SECONDS = 30.0


@dataclass(frozen=True)
class Report:
    """What an engine said at the end of a step.

    Attributes:
        time_seconds: of the clock that all processes of a machine share.
        load: of this engine; what was preempted is counted apart.
    """

    time_seconds: float
    load: Load


@dataclass
class News:
    """What one process has learnt since it last looked at the board.

    Attributes:
        reports: by the index of the engine.
        num_preempted: requests that lost their blocks.
        num_unfinished: requests of this process that have not been answered yet.
    """

    reports: dict[int, Report] = field(default_factory=dict)
    num_preempted: int = 0
    num_unfinished: int = 0


@dataclass
class _Content:
    """What stands on the board."""

    state: State
    reports: dict[int, Report] = field(default_factory=dict)
    num_preempted: int = 0
    # Process to (time, unfinished requests).
    servers: dict[int, tuple[float, int]] = field(default_factory=dict)

    def load(self) -> Load:
        """The load as all processes together know it."""
        if not any(num_unfinished for _, num_unfinished in self.servers.values()):
            # An engine without work makes no steps, so its last report may speak of requests that are gone.
            return Load()
        load = Load.of_engines([report.load for report in self.reports.values()])
        return replace(load, num_preempted=self.num_preempted)

    def forget(self, now_seconds: float) -> None:
        """Take engines that have said nothing for long for idle, and processes for ended."""
        oldest = now_seconds - GONE_SECONDS
        for engine, report in self.reports.items():
            if report.time_seconds < oldest:
                self.reports[engine] = replace(report, load=Load())
        self.servers = {process: entry for process, entry in self.servers.items() if entry[0] >= oldest}


class Board:
    """The shared folder, as one process sees it."""

    def __init__(self, settings: ElasticSettings, folder: Path, process: int | None = None) -> None:
        """Use a folder that exists; the first process to come starts the controller.

        Args:
            settings: of the controller, the same in every process.
            folder: of this server alone, empty when it starts.
            process: what this process is known by; None takes its identifier.
        """
        self.settings = settings
        self._file = folder / "board.json"
        self._lock = folder / "lock"
        self._process = os.getpid() if process is None else process

    def exchange(self, news: News, now_seconds: float) -> tuple[State, Load] | None:
        """Put what this process has learnt on the board and let the controller make one step.

        Args:
            news: of this process.
            now_seconds: of the clock that all processes of the machine share.

        Returns:
            The controller's state and the load that it was shown; None if another process is at the board: then
            nothing has been read or written.
        """
        with self._locked() as mine:
            if not mine:
                return None
            content = self._read(now_seconds)
            for engine, report in news.reports.items():
                known = content.reports.get(engine)
                if known is None or known.time_seconds < report.time_seconds:
                    content.reports[engine] = report
            content.num_preempted += news.num_preempted
            content.servers[self._process] = (now_seconds, news.num_unfinished)
            content.forget(now_seconds)
            load = content.load()
            content.state = step(self.settings, content.state, load, now_seconds)
            content.num_preempted = 0
            self._write(content)
            return content.state, load

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        # Never waits: a process that was stopped at the board must not stop the others.
        with self._lock.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _read(self, now_seconds: float) -> _Content:
        try:
            values = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return _Content(start(self.settings, now_seconds))
        state = {**values["state"], "hold_seconds": tuple(values["state"]["hold_seconds"])}
        return _Content(
            State(**state),
            {int(engine): _report(report) for engine, report in values["reports"].items()},
            values["num_preempted"],
            {int(process): (time, count) for process, (time, count) in values["servers"].items()},
        )

    def _write(self, content: _Content) -> None:
        # In one piece: a process may end at any moment.
        draft = self._file.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(content)), encoding="utf-8")
        draft.replace(self._file)


def _report(values: dict[str, Any]) -> Report:
    return Report(values["time_seconds"], Load(**values["load"]))
