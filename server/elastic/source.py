"""The load-following budget in an API server process: vLLM's statistics in, a budget for each request out."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from ficoco_vllm.server.elastic.board import Board, News, Report
from ficoco_vllm.server.elastic.controller import Load
from ficoco_vllm.server.elastic.settings import ElasticSettings

# Between two looks at the board.
TICK_SECONDS = 0.25

# A child of vLLM's logger, whose handlers and level it shares.
logger = init_logger("vllm.ficoco.elastic")


class ElasticBudget:
    """What a request gets that names no budget; called for each, before its prompt is sized."""

    def __init__(
        self,
        settings: ElasticSettings,
        folder: Path,
        num_unfinished: Callable[[], int],
        show: Callable[[int], None],
    ) -> None:
        """Start at what the board says.

        Args:
            settings: of the controller.
            folder: that the API server processes share, see `Board`.
            num_unfinished: how many requests of this process have not been answered yet.
            show: is told the budget whenever it may have changed, for the metrics.
        """
        self.settings = settings
        self._board = Board(settings, folder)
        self._num_unfinished = num_unfinished
        self._show = show
        self._news = News()
        self._level = len(settings.budgets) - 1
        self.look()

    def __call__(self) -> int:
        """Visual tokens of an image. May be called in any thread: prompts are processed outside the event loop."""
        return self.settings.budgets[self._level]

    def reachable(self, check: Callable[[int], Any]) -> int:
        """The budget for a method that cannot reach every one: the lowest that it can, from the current one upwards.

        Args:
            check: of one budget; raises ValueError where the method cannot reach it.

        Returns:
            The current budget where the method reaches none: it is refused like one that the request had named.
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
        """Note what vLLM reports of a step.

        Args:
            engine: index.
            stats: of the scheduler, None where another process got them.
            num_preempted: requests of this process that were preempted in the step.
        """
        self._news.num_preempted += num_preempted
        if stats is not None:
            waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
            load = Load(stats.kv_cache_usage, stats.num_running_reqs, waiting)
            self._news.reports[engine] = Report(time.monotonic(), load)

    def look(self) -> None:
        """Exchange news with the other processes, and take over the level."""
        now = time.monotonic()
        self._news.num_unfinished = self._num_unfinished()
        seen = self._board.exchange(self._news, now)
        if seen is None:
            return
        state, load = seen
        self._news = News()
        if state.changed_seconds == now:  # this very look moved it, so one process says it once
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
        """Look at the board for as long as the server runs."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.look()


class LoadRecorder(AggregateStatLoggerBase):
    """Hands vLLM's statistics to an `ElasticBudget`."""

    def __init__(self, budget: ElasticBudget) -> None:
        """Record for one budget.

        Args:
            budget: of this process.
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
        """Nothing to say."""


def install(
    settings: ElasticSettings, folder: Path, engine_client: Any, show: Callable[[int], None]
) -> tuple[ElasticBudget, "asyncio.Task[None]"]:
    """Let the budget follow an engine. To be called in the event loop of an API server process.

    vLLM's group of stat logger plugins would do for the statistics, but vLLM loads these into every server of the
    environment and switches statistics on for all of them; so the recorder joins this server's own loggers.

    Args:
        settings: of the controller.
        folder: that the API server processes share.
        engine_client: vLLM's `AsyncLLM`.
        show: is told the budget whenever it may have changed.

    Returns:
        The budget, and the task that keeps it up to date; hold on to the task, else it is collected.

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
