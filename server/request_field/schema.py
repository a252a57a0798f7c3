"""The field `ficoco` of chat and completion bodies, and what answers tell in `usage.ficoco`."""

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from vllm.exceptions import VLLMValidationError

FIELD = "ficoco"
OFF: Final = "off"


class FicocoRequest(BaseModel):
    """How the images of one request are reduced.

    Attributes:
        method: one that the server can run; None leaves the server's.
        keep: visual tokens that are left of each image in the end; None leaves the server's.
        kv_budget: instead of `keep`: visual tokens of an image in the KV cache, averaged over the decoder's layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str | None = Field(default=None, strict=True)
    keep: int | None = Field(default=None, ge=1, strict=True)
    kv_budget: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class FicocoUsage(BaseModel):
    """What the reduction did to one request; all its prompts together.

    Attributes:
        method: name, "off" where nothing left; several differ only in a batch, joined by ",".
        visual_tokens: patches of all images, before any reduction.
        visual_tokens_kept: what is left of them in the last layers.
        kv_bytes_saved: of KV cache that the prompt does not need, over all layers and workers.
    """

    method: str
    visual_tokens: int
    visual_tokens_kept: int
    kv_bytes_saved: int


def parse(value: Any) -> FicocoRequest | Literal["off"] | None:
    """Read the field.

    Args:
        value: as it came in the body; None where the body has no such field.

    Raises:
        VLLMValidationError: naming the field, its value and what is allowed (HTTP 400).
    """
    if value is None:
        return None
    if value == OFF:
        return OFF
    fields = ", ".join(FicocoRequest.model_fields)
    if not isinstance(value, dict):
        raise VLLMValidationError(
            f"{FIELD} = {value!r} is not allowed; allowed: {OFF!r}, or an object of {fields}", parameter=FIELD
        )
    try:
        asked = FicocoRequest.model_validate(value)
    except ValidationError as error:
        found = error.errors()[0]
        name = str(found["loc"][0])
        if name not in FicocoRequest.model_fields:
            raise VLLMValidationError(
                f"{FIELD}.{name} is not a field of this server; allowed: {fields}",
                parameter=f"{FIELD}.{name}",
            ) from error
        raise VLLMValidationError(
            f"{FIELD}.{name} = {found['input']!r} is not allowed; {found['msg']}", parameter=f"{FIELD}.{name}"
        ) from error
    if asked.keep is not None and asked.kv_budget is not None:
        raise VLLMValidationError(
            f"{FIELD}.kv_budget = {asked.kv_budget} beside {FIELD}.keep = {asked.keep} is not allowed; "
            "allowed: one of them",
            parameter=f"{FIELD}.kv_budget",
        )
    if asked.method == OFF:
        if asked.keep is not None or asked.kv_budget is not None:
            raise VLLMValidationError(
                f"{FIELD}.method = {OFF!r} keeps all visual tokens; allowed: no keep and no kv_budget beside it",
                parameter=f"{FIELD}.method",
            )
        return OFF
    return asked
