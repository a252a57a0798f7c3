"""The load-following budget of an API server process: vLLM's statistics in, a budget for each request out."""

import time
from collections.abc import Callable
from pathlib import Path

from vllm.logger import init_logger

from ficoco_vllm.server.elastic.settings import ElasticSettings
from ficoco_vllm.server.elastic.shared_controller import SharedController
from ficoco_vllm.server.load.recorder import LoadRecorder
from ficoco_vllm.server.load.reports import Observations

# A child of vLLM's logger, whose handlers and level it shares.
logger = init_logger("vllm.ficoco.elastic")


class ElasticBudget:
    """Budget of requests that name none, see `ficoco_vllm.server.budget.Source`."""

    def __init__(
        self,
        settings: ElasticSettings,
        folder: Path,
        recorder: LoadRecorder,
        num_unfinished: Callable[[], int],
    ) -> None:
        """Start at the controller's current level.

        Args:
            settings: settings of the controller.
            folder: folder that the API server processes share, see `SharedController`.
            recorder: recorder of vLLM's statistics in this process.
            num_unfinished: returns the number of open requests of this process.
        """
        self.settings = settings
        self._controller = SharedController(settings, folder)
        self._recorder = recorder
        self._num_unfinished = num_unfinished
        self._level = len(settings.budgets) - 1
        self.update()

    @property
    def budgets(self) -> tuple[int, ...]:
        """All budgets, ascending."""
        return self.settings.budgets

    def __call__(self) -> int:
        """Visual tokens of an image. Thread-safe: prompts are processed outside of the event loop."""
        return self.settings.budgets[self._level]

    def update(self) -> None:
        """Hand the observations of this process to the controller, and take over its level."""
        now = time.monotonic()
        observations = self._recorder.observations
        observations.num_unfinished = self._num_unfinished()
        updated = self._controller.update(observations, now)
        if updated is None:
            return
        state, load = updated
        self._recorder.observations = Observations()
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
