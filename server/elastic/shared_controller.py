"""One controller for all API server processes of a server, with its state in a folder that they share."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ficoco_vllm.server.elastic.controller import State, start, step
from ficoco_vllm.server.elastic.settings import ElasticSettings
from ficoco_vllm.server.load.reports import Load, LoadTable, Observations
from ficoco_vllm.server.load.shared_file import SharedFile


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
        self._file = SharedFile(folder / "controller.json")
        self._process = os.getpid() if process is None else process

    def update(self, observations: Observations, now_seconds: float) -> tuple[State, Load] | None:
        """Add the observations of this process, and let the controller make one step.

        Args:
            observations: observations of this process.
            now_seconds: time on the clock that all processes of the machine share.

        Returns:
            The controller's state and its input; None if another process is updating: then nothing changes.
        """
        results: list[tuple[State, Load]] = []

        def change(values: Any) -> Any:
            table = LoadTable() if values is None else LoadTable.read(values["table"])
            state = start(self.settings, now_seconds) if values is None else _state(values["state"])
            table.add(observations, self._process, now_seconds)
            load = table.take()
            state = step(self.settings, state, load, now_seconds)
            results.append((state, load))
            return {"state": asdict(state), "table": asdict(table)}

        return results[0] if self._file.update(change) else None


def _state(values: dict[str, Any]) -> State:
    return State(**{**values, "hold_seconds": tuple(values["hold_seconds"])})
