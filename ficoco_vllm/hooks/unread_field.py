"""Refusal of the request field `ficoco` where no endpoint of ours reads it: vLLM drops unknown fields silently.

This concerns `vllm serve` without our endpoint plugin, and the offline `run-batch`, which loads no such plugins.
"""

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.online_renderer import OnlineRenderer

from ficoco_vllm.hooks.wrapping import wrap
from ficoco_vllm.request_fields import FIELD, find_misplaced

# Attribute of a renderer whose requests' field is read.
READ = "ficoco"


def hook_renderer() -> None:
    """Make vLLM's renderer refuse the field unless an endpoint of ours reads it. Idempotent."""
    wrap(OnlineRenderer, "preprocess_chat", _preprocess)
    wrap(OnlineRenderer, "preprocess_cmpl", _preprocess)


async def _preprocess(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    if not getattr(self, READ, False):
        extra = getattr(request, "model_extra", None) or {}
        path = FIELD if FIELD in extra else find_misplaced(extra)
        if path is not None:
            raise VLLMValidationError(
                f"{path} is not read here; allowed: without it, raw mm_processor_kwargs or vllm_xargs, or a server "
                "with the endpoint plugin ficoco_endpoint (`ficoco-vllm serve`)",
                parameter=path,
            )
    return await original(self, request, *args, **kwargs)
