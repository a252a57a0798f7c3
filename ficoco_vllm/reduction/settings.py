"""Base of all settings of methods and stages: frozen, closed, and with errors that say what is allowed."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo


class Settings(BaseModel):
    """Settings of one stage; a method's settings inherit from those of its stages."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DecoderSettings(Settings):
    """Settings that the decoder reads, not the stages.

    Attributes:
        start_layer: first reducing decoder layer, 0-based; None leaves it to the schedule of the method.
        schedule: how the removals are spread over the reducing layers, or the counts themselves.
    """

    start_layer: int | None = Field(default=None, ge=0)
    schedule: Literal["even", "one-shot", "geometric"] | tuple[int, ...] = "even"


class EncoderSettings(DecoderSettings):
    """Settings that the vision tower reads, not the stages.

    Attributes:
        proportional_attention: add log(size) to the attention logits of later layers, so that a merged token
            counts for as many patches as it stands for (ToMe's proportional attention, arXiv:2210.09461,
            Eq. 1).
    """

    proportional_attention: bool = False


S = TypeVar("S", bound=Settings)


def parse(model: type[S], values: Mapping[str, Any], owner: str) -> S:
    """Validate settings.

    Args:
        model: the settings model.
        values: field name to value.
        owner: who is being configured, for the message.

    Returns:
        The frozen settings.

    Raises:
        ValueError: naming each wrong field, its value and what is allowed.
    """
    try:
        return model(**values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = str(item["loc"][0]) if item["loc"] else "settings"
            if item["type"] == "extra_forbidden":
                allowed = ", ".join(model.model_fields) or "none"
                lines.append(f"{name} is not a setting of {owner} (settings: {allowed})")
            elif name in model.model_fields:
                lines.append(
                    f"{name} = {values.get(name)!r} is not allowed for {owner}: {item['msg']}; "
                    f"allowed: {describe(model.model_fields[name])}"
                )
            else:
                lines.append(f"settings of {owner}: {item['msg']}")
        raise ValueError("; ".join(dict.fromkeys(lines))) from error


def describe(field: FieldInfo) -> str:
    """The allowed range of a field in words, such as `float, >= 0, <= 1`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {getattr(item, key)}"
        for item in field.metadata
        for key, sign in signs.items()
        if getattr(item, key, None) is not None
    ]
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(repr(value) for value in get_args(annotation))
    plain = isinstance(annotation, type) and not get_args(annotation)
    return annotation.__name__ if plain else str(annotation)
