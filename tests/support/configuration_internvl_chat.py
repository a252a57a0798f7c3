"""Configuration of a checkpoint in OpenGVLab's own format, whose folder brings this file (`trust_remote_code`)."""

from typing import Any

from transformers import PreTrainedConfig, Qwen2Config


class InternVisionConfig(PreTrainedConfig):
    """InternViT's; its fields are those of config.json."""

    model_type = "intern_vit_6b"


class InternVLChatConfig(PreTrainedConfig):
    """The fields of published checkpoints; nothing here is read by ficoco-vllm but through vLLM."""

    model_type = "internvl_chat"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(**fields)
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))

    def to_dict(self) -> dict[str, Any]:
        """As published classes do it."""
        parts = {"vision_config": self.vision_config.to_dict(), "llm_config": self.llm_config.to_dict()}
        return {**self.__dict__, **parts, "model_type": self.model_type}
