"""The load-following budget of an API server process: vLLM's statistics in, a budget for each request out."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from ficoco_vllm.server.elastic.controller import Load
from ficoco_vllm.server.elastic.settings import ElasticSettings
from ficoco_vllm.server.elastic.shared_controller import EngineReport, Observations, SharedController

# Interval between two updates of the controller.
UPDATE_SECONDS = 0.25

# A child of vLLM's logger, whose handlers and level it shares.
logger = init_logger("vllm.ficoco.elastic")


class ElasticBudget:
    """Budget of requests that name none. Called for each of them before its prompt is sized."""

    def __init__(
        self,
        settings: ElasticSettings,
        folder: Path,
        num_unfinished: Callable[[], int],
        show: Callable[[int], None],
    ) -> None:
        """Start at the controller's current level.

        Args:
            settings: settings of the controller.
            folder: folder that the API server processes share, see `SharedController`.
            num_unfinished: returns the number of open requests of this process.
            show: called with the budget whenever it may have changed, for the metrics.
        """
        self.settings = settings
        self._controller = SharedController(settings, folder)
        self._num_unfinished = num_unfinished
        self._show = show
        self._observations = Observations()
        self._level = len(settings.budgets) - 1
        self.update()

    def __call__(self) -> int:
        """Visual tokens of an image. Thread-safe: prompts are processed outside of the event loop."""
        return self.settings.budgets[self._level]

    def reachable(self, check: Callable[[int], Any]) -> int:
        """Find the lowest budget from the current one upwards that a method can reach.

        Args:
            check: called with a budget; raises ValueError where the method cannot reach it.

        Returns:
            The current budget where the method reaches none: the request is then refused as if it had named it.
        """
        current = self()
        for budget in self.settings.budgets:
            if budget >= current:
                try:
                    check(budget)
                except ValueError:
                    continue
                return budget
        return current

    def record(self, engine: int, stats: SchedulerStats | None, num_preempted: int) -> None:
        """Record vLLM's statistics of a step.

        Args:
            engine: index of the engine.
            stats: statistics of the scheduler, None where another process gets them.
            num_preempted: requests of this process that were preempted in the step.
        """
        self._observations.num_preempted += num_preempted
        if stats is not None:
            waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
            load = Load(stats.kv_cache_usage, stats.num_running_reqs, waiting)
            self._observations.reports[engine] = EngineReport(time.monotonic(), load)

    def update(self) -> None:
        """Hand the observations of this process to the controller, and take over its level."""
        now = time.monotonic()
        self._observations.num_unfinished = self._num_unfinished()
        updated = self._controller.update(self._observations, now)
        if updated is None:
            return
        state, load = updated
        self._observations = Observations()
        if state.changed_seconds == now:  # this update changed the level, so only this process logs it
            logger.info(
                "ficoco: requests that name no budget now keep %d visual tokens of an image "
                "(KV cache %.0f%% in use, %d running, %d waiting)",
                self.settings.budgets[state.level],
                100 * load.kv_usage,
                load.num_running,
                load.num_waiting,
            )
        self._level = state.level
        self._show(self.settings.budgets[state.level])

    async def follow(self) -> None:
        """Update for as long as the server runs."""
        while True:
            await asyncio.sleep(UPDATE_SECONDS)
            self.update()


class LoadRecorder(AggregateStatLoggerBase):
    """Stat logger of vLLM that hands the statistics to an `ElasticBudget`."""

    def __init__(self, budget: ElasticBudget) -> None:
        """Record for one budget.

        Args:
            budget: budget of this process.
        """
        self._budget = budget

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM after each step of an engine whose outputs reach this process."""
        num_preempted = 0 if iteration_stats is None else iteration_stats.num_preempted_reqs
        self._budget.record(engine_idx, scheduler_stats, num_preempted)

    def log_engine_initialized(self) -> None:
        """Do nothing."""


def install(
    settings: ElasticSettings, folder: Path, engine_client: Any, show: Callable[[int], None]
) -> tuple[ElasticBudget, "asyncio.Task[None]"]:
    """Let a budget follow the load of an engine. Call it in the event loop of an API server process.

    The recorder joins this server's own stat loggers: vLLM loads plugins of its group for stat loggers into every
    server of the environment, and turns statistics on for all of them.

    Args:
        settings: settings of the controller.
        folder: folder that the API server processes share.
        engine_client: vLLM's `AsyncLLM`.
        show: called with the budget whenever it may have changed.

    Returns:
        The budget, and the task that updates it; keep a reference to the task, or it is collected.

    Raises:
        ValueError: vLLM keeps no statistics.
    """
    manager = getattr(engine_client, "logger_manager", None)
    if manager is None:
        raise ValueError(
            "--disable-log-stats is not allowed with --ficoco-elastic, which follows these statistics"
        )
    budget = ElasticBudget(settings, folder, engine_client.get_num_unfinished_requests, show)
    manager.stat_loggers.append(LoadRecorder(budget))
    return budget, asyncio.get_running_loop().create_task(budget.follow())
