"""Reports of the engines' load, and their sum over the processes of a server.

vLLM sends the statistics of a step to one of the API server processes only, so none sees them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# Time without a report after which an engine counts as idle, and a process as ended.
EXPIRY_SECONDS = 30.0


@dataclass(frozen=True)
class Load:
    """Load of one or several engines.

    Attributes:
        kv_usage: share of the KV cache that requests hold, 0 to 1.
        num_running: requests that hold KV blocks.
        num_waiting: accepted requests that wait.
        num_preempted: requests that lost their blocks since the last report.
    """

    kv_usage: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    num_preempted: int = 0

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits."""
        return self.num_running + self.num_waiting == 0

    @property
    def queue(self) -> float:
        """Waiting requests per running one: the waiting time in units of the running time."""
        return (self.num_waiting + self.num_preempted) / max(1, self.num_running)

    @classmethod
    def of_engines(cls, loads: Sequence["Load"]) -> "Load":
        """Total load of engines that share the requests."""
        if not loads:
            return cls()
        return cls(
            sum(load.kv_usage for load in loads) / len(loads),
            sum(load.num_running for load in loads),
            sum(load.num_waiting for load in loads),
            sum(load.num_preempted for load in loads),
        )


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
    """Observations of one process since it last handed them over.

    Attributes:
        reports: latest report of each engine, by index.
        num_preempted: requests that lost their blocks.
        num_unfinished: requests of this process that are still open.
    """

    reports: dict[int, EngineReport] = field(default_factory=dict)
    num_preempted: int = 0
    num_unfinished: int = 0


@dataclass
class LoadTable:
    """Observations of all processes of a server.

    Attributes:
        reports: latest report of each engine, by index.
        num_preempted: requests that lost their blocks since the last call of `take`.
        servers: process to (time, unfinished requests).
    """

    reports: dict[int, EngineReport] = field(default_factory=dict)
    num_preempted: int = 0
    servers: dict[int, tuple[float, int]] = field(default_factory=dict)

    @classmethod
    def read(cls, values: dict[str, Any]) -> "LoadTable":
        """The table of which `dataclasses.asdict` was written as JSON."""
        return cls(
            {
                int(engine): EngineReport(report["time_seconds"], Load(**report["load"]))
                for engine, report in values["reports"].items()
            },
            values["num_preempted"],
            {int(process): (time, count) for process, (time, count) in values["servers"].items()},
        )

    def add(self, observations: Observations, process: int, now_seconds: float) -> None:
        """Add the observations of one process, and drop what is too old.

        Args:
            observations: since the process's last call.
            process: its identifier.
            now_seconds: time on the clock that all processes of the machine share.
        """
        for engine, report in observations.reports.items():
            known = self.reports.get(engine)
            if known is None or known.time_seconds < report.time_seconds:
                self.reports[engine] = report
        self.num_preempted += observations.num_preempted
        self.servers[process] = (now_seconds, observations.num_unfinished)
        oldest = now_seconds - EXPIRY_SECONDS
        for engine, report in self.reports.items():
            if report.time_seconds < oldest:
                self.reports[engine] = replace(report, load=Load())
        self.servers = {process: entry for process, entry in self.servers.items() if entry[0] >= oldest}

    def take(self) -> Load:
        """The load over all engines. Requests that were preempted are counted once."""
        num_preempted, self.num_preempted = self.num_preempted, 0
        if not any(num_unfinished for _, num_unfinished in self.servers.values()):
            # An idle engine makes no steps, so its last report may count requests that are gone.
            return Load()
        load = Load.of_engines([report.load for report in self.reports.values()])
        return replace(load, num_preempted=num_preempted)
