"""The request field `ficoco`, and the usage that responses report as `usage.ficoco`."""

from collections.abc import Callable
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from vllm.exceptions import VLLMValidationError

from ficoco_vllm.request_fields import FIELD

OFF: Final = "off"


class FicocoRequest(BaseModel):
    """Method and budget for the images of one request.

    Attributes:
        method: name of a method; None keeps the server's.
        keep: visual tokens of each image after all reductions; None keeps the server's.
        keep_ratio: alternative to `keep` for methods of the tower: a share of the visual tokens of each image, or
            of each tile of it.
        kv_budget: alternative to `keep`: visual tokens of an image in the KV cache, averaged over the decoder's layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str | None = Field(default=None, strict=True)
    keep: int | None = Field(default=None, ge=1, strict=True)
    keep_ratio: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False, strict=True)
    kv_budget: float | None = Field(default=None, gt=0, allow_inf_nan=False, strict=True)

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are named, of which only one is allowed."""
        named = {name: getattr(self, name) for name in ("keep", "keep_ratio", "kv_budget")}
        return {name: value for name, value in named.items() if value is not None}


class FicocoUsage(BaseModel):
    """Effect of the reduction on one request, summed over its prompts.

    Attributes:
        method: name, or "off" if no token was removed; the methods of a batch are joined by ",".
        visual_tokens: patches of all images before any reduction.
        visual_tokens_kept: visual tokens in the decoder's last layers.
        kv_bytes_saved: KV cache that the prompt does not need, over all layers and workers.
    """

    method: str
    visual_tokens: int
    visual_tokens_kept: int
    kv_bytes_saved: int


def parse(value: Any, allowed: Callable[[str], str]) -> FicocoRequest | Literal["off"] | None:
    """Validate the field.

    Args:
        value: the field's JSON value; None where the body has no such field.
        allowed: maps a part of the field to what this server allows there, for error texts.

    Raises:
        VLLMValidationError: naming the field, its value and the allowed values (HTTP 400).
    """
    if value is None:
        return None
    if value == OFF:
        return OFF
    fields = ", ".join(FicocoRequest.model_fields)
    if not isinstance(value, dict):
        raise _error(FIELD, f"= {value!r} is not allowed; allowed: {OFF!r}, or an object of {fields}")
    try:
        field = FicocoRequest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if name not in FicocoRequest.model_fields:
            raise _error(f"{FIELD}.{name}", f"is not a field of this server; allowed: {fields}") from error
        raise _error(
            f"{FIELD}.{name}", f"= {first['input']!r} is not allowed; allowed: {allowed(name)}"
        ) from error
    if len(field.budgets) > 1:
        (one, value), *_, (other, second) = field.budgets.items()
        raise _error(
            f"{FIELD}.{other}",
            f"= {second} together with {FIELD}.{one} = {value} is not allowed; allowed: one of them",
        )
    if field.method == OFF:
        if field.budgets:
            raise _error(
                f"{FIELD}.method",
                f"= {OFF!r} keeps all visual tokens; allowed: no budget with it",
            )
        return OFF
    return field


def _error(name: str, reason: str) -> VLLMValidationError:
    return VLLMValidationError(f"{name} {reason}", parameter=name)
