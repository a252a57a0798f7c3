"""Settings of the budget that holds a target agreement (`--ficoco-target-agreement`) and their checks."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

OPTION = "--ficoco-target-agreement"
SETTING = "quality"
LADDER = f"{SETTING}.ladder"
# Parts of all visual tokens that the rungs keep where the operator names no ladder.
_DIVISORS = (18, 9, 6, 4.5, 3, 2, 1)
_ALLOWED = {
    "target_agreement": "a number above 0, below 1",
    "ladder": "increasing integers of at least 1, two at least",
    "share": "a number above 0, at most 1",
    "max_extra": "a number above 0, at most 1",
    "max_tokens_per_minute": "an integer of at least 1",
    "max_kv_usage": "a number above 0, at most 1",
    "max_queue": "a number of at least 0",
    "confidence": "a number from 0.5 to below 1",
    "seed": "an integer",
    "class_header": "the name of an HTTP header",
    "class_metadata": "a key of the request's metadata, without class_header",
    "state": "the path of a file",
}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Share = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(min_length=1)]


class QualitySettings(BaseModel):
    """Target, ladder of budgets, and limits on the cost of comparisons.

    Attributes:
        target_agreement: share of the answers that are to be those of the full model.
        ladder: budgets, visual tokens of an image, ascending; None takes parts of the model's.
        share: at most this share of the requests that name no budget is answered a second time.
        max_extra: tokens of these second answers, at most this share of the tokens of the first ones.
        max_tokens_per_minute: the same, absolute, for each API server process.
        max_kv_usage: second answers wait while more than this share of the KV cache is in use.
        max_queue: the same for waiting requests per running one.
        confidence: confidence of every bound.
        seed: seed of the choice of requests.
        class_header: header of a request that names its class of traffic.
        class_metadata: key in a request's `metadata` that names it.
        state: file that keeps the counts across restarts; None discards them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    target_agreement: float = Field(gt=0, lt=1)
    ladder: Annotated[tuple[int, ...] | None, BeforeValidator(_as_tuple)] = None
    share: Share = 0.01
    max_extra: Share = 0.03
    max_tokens_per_minute: int = Field(default=60_000, ge=1)
    max_kv_usage: Share = 0.8
    max_queue: float = Field(default=0.25, ge=0)
    confidence: float = Field(default=0.95, ge=0.5, lt=1)
    seed: int = 0
    class_header: Name | None = None
    class_metadata: Name | None = None
    state: Name | None = None

    @field_validator("ladder")
    @classmethod
    def _check_ladder(cls, ladder: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if ladder is not None and (len(ladder) < 2 or ladder[0] < 1 or list(ladder) != sorted(set(ladder))):
            raise ValueError(f"ladder = {list(ladder)} is not allowed; allowed: {_ALLOWED['ladder']}")
        return ladder

    @field_validator("class_metadata")
    @classmethod
    def _check_class(cls, name: str | None, info: Any) -> str | None:
        if name is not None and info.data.get("class_header") is not None:
            raise ValueError(
                f"class_metadata = {name!r} is not allowed; allowed: {_ALLOWED['class_metadata']}"
            )
        return name

    @classmethod
    def parse(cls, values: Any) -> "QualitySettings":
        """Validate settings.

        Args:
            values: the value of "quality" in `--ficoco-config`, with the target of the command line.

        Raises:
            ValueError: naming each wrong field, its value and what is allowed.
        """
        if not isinstance(values, dict):
            raise ValueError(
                f"""{SETTING} = {values!r} is not allowed; allowed: an object such as {{"target_agreement": 0.98}}"""
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError("; ".join(_message(item) for item in error.errors())) from error

    def on_model(self, most: int, min_keep: int = 1) -> "QualitySettings":
        """The settings with the ladder that a model serves.

        Args:
            most: visual tokens of an image without reduction.
            min_keep: the operator's lower bound on a request's budget.

        Raises:
            ValueError: naming the ladder, and what is allowed.
        """
        if self.ladder is None:
            rungs = {max(1, round(most / divisor)) for divisor in _DIVISORS}
            ladder = tuple(sorted(rung for rung in rungs if rung >= min_keep))
            return self.model_copy(update={"ladder": ladder})
        if self.ladder[0] < min_keep or self.ladder[-1] > most:
            raise ValueError(
                f"{LADDER} = {list(self.ladder)} is not allowed; allowed: {_ALLOWED['ladder']}, from "
                f"{min_keep} to {most}"
            )
        return self


def _message(item: Any) -> str:
    """Text of one pydantic error: field, value, what is allowed."""
    if item["type"] == "value_error":
        return f"{SETTING}.{item['ctx']['error']}"
    field = str(item["loc"][0])
    if item["type"] == "extra_forbidden":
        return f"{SETTING}.{field} is not a field; allowed: {', '.join(_ALLOWED)}"
    if item["type"] == "missing":
        return f"{SETTING}.{field} is missing; allowed: {_ALLOWED[field]}, also as {OPTION}"
    return f"{SETTING}.{field} = {item['input']!r} is not allowed; allowed: {_ALLOWED[field]}"
