"""Hugging Face's models in float32, asked as the engines are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

CLASSES = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
# A prompt and its images.
Prompt = tuple[str, Sequence[Image.Image]]


class HfLlava:
    """A model and its processor.

    Attributes:
        model: in evaluation mode.
        processor: pads on the left.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        model_class: Any = CLASSES[AutoConfig.from_pretrained(folder).model_type]
        self.model = model_class.from_pretrained(folder, dtype=dtype, **options).eval()
        self.model.generation_config = GenerationConfig(
            pad_token_id=3
        )  # no end token: all answers are equally long
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"

    def inputs(self, prompts: Sequence[Prompt]) -> Any:
        """Arguments of the model for a batch of prompts."""
        images = [image for _, of_prompt in prompts for image in of_prompt]
        return self.processor(
            text=[text for text, _ in prompts],
            images=images or None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )

    def ask(
        self, prompts: Sequence[Prompt], num_tokens: int = 6, **options: Any
    ) -> list[tuple[list[int], Tensor]]:
        """Greedy answers of one batch, each with its log-probabilities (num_tokens, vocabulary)."""
        inputs = self.inputs(prompts)
        output = self.model.generate(
            **inputs,
            max_new_tokens=num_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        assert torch.equal(output.sequences[:, :-num_tokens], inputs["input_ids"])
        logprobs = torch.stack(output.logits, dim=1).float().log_softmax(dim=-1)
        return list(zip(output.sequences[:, -num_tokens:].tolist(), logprobs, strict=True))
