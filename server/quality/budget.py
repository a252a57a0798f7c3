"""The budget that holds a target, in one API server process: scores in, a budget for each class of traffic out."""

import os
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from ficoco_vllm.quality.controller import State, next_rungs, record, start
from ficoco_vllm.quality.settings import QualitySettings
from ficoco_vllm.quality.states import as_json, read_states, state_path
from ficoco_vllm.server.load.recorder import LoadRecorder
from ficoco_vllm.server.load.reports import Load, LoadTable, Observations
from ficoco_vllm.server.load.shared_file import SharedFile

# Class of a request whose class is not named, and of those that come after `MAX_CLASSES` others.
UNNAMED, OTHER = "", "other"
MAX_CLASSES = 32
# Class of the request that is being answered.
traffic: ContextVar[str] = ContextVar("ficoco_traffic", default=UNNAMED)

# A child of vLLM's logger, whose handlers and level it shares.
logger = init_logger("vllm.ficoco.quality")

# Index of a rung and its score.
Scores = tuple[tuple[int, float], ...]


class QualityBudget:
    """Budget of requests that name none, see `ficoco_vllm.server.budget.Source`.

    Attributes:
        settings: with the ladder of the model.
        method: method of the server; the only one whose budget moves.
        load: load of the engines, at the last update.
        states: state of each class.
    """

    def __init__(
        self,
        settings: QualitySettings,
        method: str,
        folder: Path,
        recorder: LoadRecorder,
        num_unfinished: Callable[[], int],
    ) -> None:
        """Continue from the state of an earlier server, where its file was kept.

        Args:
            settings: with a ladder.
            method: method of the server.
            folder: that the API server processes share, empty when the server starts.
            recorder: recorder of vLLM's statistics in this process.
            num_unfinished: returns the number of open requests of this process.
        """
        self.settings = settings
        self.method = method
        self.load = Load()
        self.states: dict[str, State] = {}
        self._state = SharedFile(state_path(settings, folder))
        self._loads = SharedFile(folder / "load.json")
        self._recorder = recorder
        self._num_unfinished = num_unfinished
        self._pending: list[tuple[str, Scores]] = []
        self._start = start(settings)
        self.states = read_states(settings, method, self._state.read())

    @property
    def budgets(self) -> tuple[int, ...]:
        """The ladder."""
        return self.settings.ladder or ()

    def __call__(self) -> int:
        """Visual tokens of an image, for the class of the request in whose context this is called."""
        return self.budgets[self.state(traffic.get()).served]

    def state(self, name: str) -> State:
        """The state of a class."""
        return self.states.get(name, self._start)

    def class_of(self, name: str | None) -> str:
        """The class of traffic that a request belongs to.

        Args:
            name: that it gives, of any length; None or empty without one.
        """
        if not name:
            return UNNAMED
        name = name[:64]
        return name if name in self.states or len(self.states) < MAX_CLASSES else OTHER

    @property
    def has_room(self) -> bool:
        """Whether the engines have room for background requests."""
        return self.load.queue <= self.settings.max_queue and self.load.kv_usage <= self.settings.max_kv_usage

    def suspects(self, name: str) -> bool:
        """Whether the answers of a class seem to have become worse."""
        return self.state(name).suspects(self.settings.target_agreement)

    def next_rungs(self, name: str, *, top_reduces: bool) -> tuple[int, ...]:
        """See the controller's function."""
        return next_rungs(self.settings, self.state(name), top_reduces=top_reduces)

    def record(self, name: str, scores: Iterable[tuple[int, float]]) -> None:
        """Record a chosen request, for the next update.

        Args:
            name: name of its class.
            scores: see the controller's `record`.
        """
        self._pending.append((name, tuple(scores)))

    def update(self) -> None:
        """Exchange scores and load with the other processes of the server."""
        self._update_load()
        pending = self._pending
        if not pending:
            # Another process may have changed it.
            self.states = read_states(self.settings, self.method, self._state.read())
            return
        states: dict[str, State] = {}

        def change(values: Any) -> Any:
            states.update(read_states(self.settings, self.method, values))
            for name, scores in pending:
                states[name] = self._recorded(name, states.get(name, self._start), scores)
            return as_json(self.settings, self.method, states)

        if self._state.update(change):
            self.states, self._pending = states, []

    def _update_load(self) -> None:
        observations = self._recorder.observations
        observations.num_unfinished = self._num_unfinished()

        def change(values: Any) -> Any:
            table = LoadTable() if values is None else LoadTable.read(values)
            table.add(observations, os.getpid(), time.monotonic())
            self.load = table.take()
            return asdict(table)

        if self._loads.update(change):
            self._recorder.observations = Observations()

    def _recorded(self, name: str, state: State, scores: Scores) -> State:
        after = record(self.settings, state, scores)
        if after.served != state.served:
            logger.info(
                "ficoco: requests%s that name no budget now keep %d visual tokens of an image (before: %d), for a "
                "target agreement of %g",
                f" of class {name!r}" if name else "",
                self.budgets[after.served],
                self.budgets[state.served],
                self.settings.target_agreement,
            )
        return after
