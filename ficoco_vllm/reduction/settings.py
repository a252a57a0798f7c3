"""Settings of methods and stages: frozen models without extra fields, whose errors name the allowed values."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

Count = Annotated[int, Field(ge=0)]


class Settings(BaseModel):
    """Settings of one stage, or of a method beyond its stages."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ScheduleSettings(Settings):
    """Layers and schedule of a method, read by the model, not by the stages.

    Attributes:
        start_layer: index of the first reducing layer, from 0; None takes the default of the model.
        schedule: distribution of the loss over the reducing layers, or the number removed at each of them.
    """

    start_layer: Count | None = None
    schedule: Literal["even", "one-shot", "geometric"] | tuple[Count, ...] = "even"


class EncoderSettings(ScheduleSettings):
    """Settings of a method in the vision encoder that the tower reads.

    Attributes:
        proportional_attention: add log(size) to the attention logits of later layers, so that a merged token counts
            as all the patches that it represents (arXiv:2210.09461, Eq. 1).
    """

    proportional_attention: bool = False


class DecoderSettings(ScheduleSettings):
    """Settings of a method in the decoder that the decoder reads.

    Attributes:
        layers: indices of the reducing layers; None means all from `start_layer` on.
    """

    layers: tuple[Count, ...] | None = None


class AttentionSettings(Settings):
    """Definition of the attention that the model measures.

    Attributes:
        attention: "probs" for softmax probabilities; "logits" for the scaled products before softmax and mask, as in
            the release of arXiv:2411.17686.
    """

    attention: Literal["probs", "logits"] = "probs"


S = TypeVar("S", bound=Settings)


def combine(name: str, *models: type[Settings]) -> type[Settings]:
    """One model with the fields of several; for a field of two models, the earlier one applies."""
    distinct = dict.fromkeys(models)
    bases = tuple(
        model
        for model in distinct
        if not any(model is not other and issubclass(other, model) for other in distinct)
    )
    return bases[0] if len(bases) == 1 else create_model(name, __base__=bases)


def parse(model: type[S], values: Mapping[str, Any], owner: str) -> S:
    """Validate settings.

    Args:
        model: the settings model.
        values: field name to value.
        owner: name of the method, for the message.

    Returns:
        The frozen settings.

    Raises:
        ValueError: naming each wrong field, its value and what is allowed.
    """
    try:
        return model(**values)
    except ValidationError as error:
        # One line a field: a field that takes several types has an error for each of them.
        wrong = {str(item["loc"][0]): item["type"] for item in error.errors()}
        raise ValueError(
            "; ".join(_complaint(model, values, owner, *item) for item in wrong.items())
        ) from error


def _complaint(model: type[Settings], values: Mapping[str, Any], owner: str, name: str, kind: str) -> str:
    if kind == "extra_forbidden":
        return f"{name} is not a setting of {owner}; allowed: {', '.join(model.model_fields) or 'none'}"
    allowed = describe(model.model_fields[name])
    return f"{name} = {values[name]!r} is not allowed for {owner}; allowed: {allowed}"


def describe(field: FieldInfo) -> str:
    """The allowed values of a field in words, such as `float >= 0.0 and <= 1.0`."""
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: Any = ()) -> str:
    """A type and its bounds in words, `Annotated` taken apart."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    metadata = [part for item in metadata for part in getattr(item, "metadata", [item])]
    bounds = [
        f"{sign} {getattr(item, key)}"
        for item in metadata
        for key, sign in signs.items()
        if getattr(item, key, None) is not None
    ]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], [*arguments[1:], *metadata])
    if annotation is Ellipsis:
        return "..."
    if annotation is type(None):
        return "None"
    if origin is Literal:
        words = " | ".join(repr(value) for value in arguments)
    elif origin is tuple:
        words = f"({', '.join(_words(argument) for argument in arguments)})"
    elif arguments:  # a union: its bounds are those of the numbers in it
        return " | ".join(_words(argument, metadata) for argument in arguments)
    else:
        words = annotation.__name__
    return f"{words} {' and '.join(bounds)}" if bounds else words
