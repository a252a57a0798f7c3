"""The oracles of InternVL on a checkpoint in OpenGVLab's own format: its weights in Hugging Face's classes."""

import json
from pathlib import Path

from PIL import Image
from torch import Tensor

from ficoco_vllm.compat.versions import internvl_chat_processors
from tests.reference.algorithm2 import Shown
from tests.reference.internvl import ReferenceInternVL
from tests.reference.internvl_decoder import ReferenceInternVLDecoder
from tests.support.random_internvl import IMAGE
from tests.support.random_internvl_chat import HF, PLACEHOLDER


class ReferenceInternVLChat(ReferenceInternVL):
    """See `ReferenceInternVL`; the image processor is vLLM's, since checkpoints of this format have none.

    Attributes:
        images: its settings.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / HF)
        config = json.loads((folder / "config.json").read_text())
        names = ("min_dynamic_patch", "max_dynamic_patch", "dynamic_image_size", "use_thumbnail")
        self.images = {name: config[name] for name in names}
        self.images["image_size"] = config["vision_config"]["image_size"]

    def pixels(self, image: Image.Image) -> Tensor:
        """See `ReferenceInternVL`."""
        of_images, _, _ = internvl_chat_processors()
        pixels: Tensor = of_images(**self.images)([image])["pixel_values_flat"]
        return pixels.double()

    def generate(
        self, prompt: str, images: list[tuple[Image.Image, int]], num_tokens: int
    ) -> tuple[list[int], Tensor]:
        """See `ReferenceInternVL`; the prompt has one `PLACEHOLDER` for each image."""
        return super().generate(prompt.replace(PLACEHOLDER, IMAGE), images, num_tokens)


class ReferenceInternVLChatDecoder(ReferenceInternVLChat, ReferenceInternVLDecoder):
    """See `ReferenceInternVLDecoder`."""

    def judge(self, method: str, prompt: str, images: list[Shown], answer: list[int]) -> Tensor:
        """See `ReferenceDecoder.judge`."""
        return super().judge(method, prompt.replace(PLACEHOLDER, IMAGE), images, answer)
