"""State file that keeps the counts of all classes across restarts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ficoco_vllm.quality.controller import Rung, State
from ficoco_vllm.quality.evidence import Tally
from ficoco_vllm.quality.settings import SETTING, QualitySettings


def state_path(settings: QualitySettings, folder: Path) -> Path:
    """The file of the states: the operator's, else one that ends with the server."""
    return folder / "quality.json" if settings.state is None else Path(settings.state)


def as_json(settings: QualitySettings, method: str, states: dict[str, State]) -> Any:
    """Content of the file."""
    head = {
        "method": method,
        "target_agreement": settings.target_agreement,
        "ladder": list(settings.ladder or ()),
    }
    return {**head, "states": {name: asdict(state) for name, state in states.items()}}


def read_states(settings: QualitySettings, method: str, values: Any) -> dict[str, State]:
    """States from the content of the file; none where it is of another method, target or ladder.

    Args:
        settings: with a ladder.
        method: method of the server.
        values: the content, or None.

    Raises:
        ValueError: the content is not that of a state file.
    """
    if values is None:
        return {}
    try:
        head = {**as_json(settings, method, {}), "states": values["states"]}
        states = {name: _state(state) for name, state in values["states"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{SETTING}.state = {settings.state!r} holds no state of a server; allowed: a file that a server wrote, or "
            "a path where there is none"
        ) from error
    return states if values == head else {}


def _state(values: dict[str, Any]) -> State:
    rungs = tuple(Rung(**{**rung, "tally": Tally(**rung["tally"])}) for rung in values["rungs"])
    return State(**{**values, "rungs": rungs, "alarm": tuple(values["alarm"])})


def check_state(settings: QualitySettings, method: str) -> None:
    """Check that a server will be able to read and write the operator's file.

    Args:
        settings: with a ladder.
        method: method of the server.

    Raises:
        ValueError: naming the file and what is allowed.
    """
    if settings.state is None:
        return
    path = Path(settings.state)
    allowed = "allowed: a file that a server wrote, or a path in a folder where there is none"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ValueError(
                f"{SETTING}.state = {settings.state!r} is not in an existing folder; {allowed}"
            ) from None
        return
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{SETTING}.state = {settings.state!r} cannot be read ({error}); {allowed}"
        ) from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{SETTING}.state = {settings.state!r} is not valid JSON ({error}); {allowed}"
        ) from error
    read_states(settings, method, values)
