"""The field `ficoco` of requests where no endpoint of ours reads it: refused, since vLLM drops fields in silence.

That is plain `vllm serve` without our endpoint plugin, and the offline `run-batch`, which loads no such plugins.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.online_renderer import OnlineRenderer

from ficoco_vllm.config import NAME

# Attribute of a renderer whose requests are read (`server/request_field/ledger.py`).
READ = "ficoco_read"
_HOOKED = "ficoco_hooked"


def hook_renderer() -> None:
    """Let vLLM's renderer refuse the field where nobody reads it; may run many times."""
    for name in ("preprocess_chat", "preprocess_cmpl"):
        original = getattr(OnlineRenderer, name)
        if not hasattr(original, _HOOKED):
            setattr(OnlineRenderer, name, _refusing(original))


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def preprocess(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, READ, False) and NAME in (getattr(request, "model_extra", None) or {}):
            raise VLLMValidationError(
                f"{NAME} is not read here; allowed: without it, raw mm_processor_kwargs or vllm_xargs, or a server "
                "with the endpoint plugin ficoco_endpoint (`ficoco-vllm serve`)",
                parameter=NAME,
            )
        return await original(self, request, *args, **kwargs)

    setattr(preprocess, _HOOKED, True)
    return preprocess
