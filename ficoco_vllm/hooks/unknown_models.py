"""Refusal of our settings for a model that the plugin does not support, where vLLM would ignore them."""

from typing import Any

from vllm.config import VllmConfig

from ficoco_vllm.config import NAME
from ficoco_vllm.hooks.wrapping import wrap
from ficoco_vllm.planning.families import ARCHITECTURES


def hook_unknown_models() -> None:
    """Make vLLM refuse our settings for such a model. Idempotent."""
    wrap(VllmConfig, "try_verify_and_update_config", _verify)


def _verify(original: Any, self: VllmConfig) -> None:
    original(self)
    additional, model = self.additional_config, self.model_config
    if (
        model is None
        or model.runner == "draft"
        or not (isinstance(additional, dict) and additional.get(NAME))
    ):
        return
    if not hasattr(model.hf_config, NAME):
        raise ValueError(
            f"ficoco: the architecture {model.architecture!r} cannot be reduced; allowed: {', '.join(ARCHITECTURES)}"
        )
