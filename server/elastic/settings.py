"""Settings of the load-following budget (`--ficoco-elastic`) and their checks."""

import json
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

OPTION = "--ficoco-elastic"
_ALLOWED = {
    "floor": "an integer of at least 1, below ceiling",
    "ceiling": "an integer above floor",
    "target_kv_usage": "a number above 0, at most 1",
    "target_queue": "a number above 0",
    "levels": "an integer from 2 to 16",
    "hysteresis": "a number from 0 to 0.5",
    "attack_seconds": "a number above 0",
    "release_seconds": "a number of at least attack_seconds",
    "max_release_seconds": "a number of at least release_seconds",
}

Seconds = Annotated[float, Field(gt=0)]


class ElasticSettings(BaseModel):
    """Range, targets and time constants of the budget.

    Attributes:
        floor: visual tokens of an image at the highest load.
        ceiling: visual tokens of an image at low load.
        target_kv_usage: share of the KV cache above which the budget falls; waiting requests count as if they ran.
        target_queue: waiting requests per running one above which the budget falls, independent of the KV cache.
        levels: number of budgets from floor to ceiling, both included.
        hysteresis: margin below the targets, predicted for the next higher budget, before the budget rises.
        attack_seconds: time constant of the smoothed load, and shortest time between two steps down.
        release_seconds: calm time before each step up.
        max_release_seconds: upper limit of that time, which grows while steps up turn out to be premature.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    floor: int = Field(ge=1)
    ceiling: int = Field(ge=2)
    target_kv_usage: float = Field(default=0.8, gt=0, le=1)
    target_queue: float = Field(default=0.25, gt=0)
    levels: int = Field(default=5, ge=2, le=16)
    hysteresis: float = Field(default=0.1, ge=0, le=0.5)
    attack_seconds: Seconds = 1.0
    release_seconds: Seconds = 10.0
    max_release_seconds: Seconds = 300.0

    @model_validator(mode="after")
    def _check_order(self) -> "ElasticSettings":
        for lower, higher, strictly in (
            ("floor", "ceiling", True),
            ("attack_seconds", "release_seconds", False),
            ("release_seconds", "max_release_seconds", False),
        ):
            least, value = getattr(self, lower), getattr(self, higher)
            if value < least or (strictly and value == least):
                raise ValueError(
                    f"{higher} = {value} is not allowed with {lower} = {least}; allowed: {_ALLOWED[higher]}"
                )
        return self

    @cached_property
    def budgets(self) -> tuple[int, ...]:
        """Visual tokens of each level, ascending from floor to ceiling in equal ratios.

        Each level is an entry of its own in every cache. There are fewer than `levels` where two coincide.
        """
        steps = self.levels - 1
        ratio = self.ceiling / self.floor
        inner = (round(self.floor * ratio ** (step / steps)) for step in range(1, steps))
        return tuple(sorted({self.floor, *inner, self.ceiling}))

    @classmethod
    def load(cls, text: str) -> "ElasticSettings":
        """Read the option.

        Args:
            text: a JSON object.

        Raises:
            ValueError: naming each wrong field, its value and what is allowed.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{OPTION} = {text!r} is not valid JSON ({error}); allowed: {_example()}"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(f"{OPTION} = {text!r} is not a JSON object; allowed: {_example()}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError("; ".join(_message(item) for item in error.errors())) from error

    def check_bounds(self, min_keep: int, max_keep: int) -> None:
        """Check floor and ceiling against the bounds of operator and model.

        Args:
            min_keep: the operator's lower bound on a request's budget.
            max_keep: visual tokens of an image without reduction.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        if self.floor < min_keep:
            raise ValueError(
                f"{OPTION}: floor = {self.floor} is not allowed; allowed: at least {min_keep} (--ficoco-min-keep)"
            )
        if self.ceiling > max_keep:
            raise ValueError(
                f"{OPTION}: ceiling = {self.ceiling} is not allowed; allowed: at most {max_keep}, the visual tokens "
                "of an image"
            )


def _example() -> str:
    return """an object such as '{"floor": 64, "ceiling": 288}'"""


def _message(item: Any) -> str:
    """Text of one pydantic error: field, value, what is allowed."""
    if item["type"] == "value_error":
        return f"{OPTION}: {item['ctx']['error']}"
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{OPTION}: {field} is not a field; allowed: {', '.join(_ALLOWED)}"
    if item["type"] == "missing":
        return f"{OPTION}: {field} is missing; allowed: {_ALLOWED[field]}"
    return f"{OPTION}: {field} = {item['input']!r} is not allowed; allowed: {_ALLOWED[field]}"
