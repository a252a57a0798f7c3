"""vLLM's statistics as observations of the load."""

import time
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from ficoco_vllm.server.load.reports import EngineReport, Load, Observations


class LoadRecorder(AggregateStatLoggerBase):
    """Stat logger of vLLM that collects the observations of this process.

    Attributes:
        observations: since they were last taken.
    """

    def __init__(self) -> None:
        self.observations = Observations()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM after each step of an engine whose outputs reach this process."""
        if iteration_stats is not None:
            self.observations.num_preempted += iteration_stats.num_preempted_reqs
        if scheduler_stats is not None:
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            load = Load(scheduler_stats.kv_cache_usage, scheduler_stats.num_running_reqs, waiting)
            self.observations.reports[engine_idx] = EngineReport(time.monotonic(), load)

    def log_engine_initialized(self) -> None:
        """Do nothing."""

    @classmethod
    def on(cls, engine_client: Any, option: str) -> "LoadRecorder":
        """A recorder among the stat loggers of this server.

        vLLM loads plugins of its group for stat loggers into every server of the environment, and turns statistics on
        for all of them; this one is added to one server.

        Args:
            engine_client: vLLM's `AsyncLLM`.
            option: that needs the statistics.

        Raises:
            ValueError: vLLM keeps no statistics.
        """
        manager = getattr(engine_client, "logger_manager", None)
        if manager is None:
            raise ValueError(
                f"--disable-log-stats is not allowed with {option}, which follows these statistics"
            )
        recorder = cls()
        manager.stat_loggers.append(recorder)
        return recorder
