"""Reduction in the decoder of Hugging Face's InternVL, written plainly."""

import torch
from torch import Tensor

from tests.reference.algorithm2 import Shown, judge
from tests.reference.internvl import ReferenceInternVL


class ReferenceInternVLDecoder(ReferenceInternVL):
    """Methods of the decoder on InternVL; FiCoCo-V where fewer than all units enter."""

    @torch.no_grad()
    def judge(self, method: str, prompt: str, images: list[Shown], answer: list[int]) -> Tensor:
        """See `ReferenceDecoder.judge`."""
        start, end = self.processor.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
        return judge(self, method, prompt, images, answer, ([start], [end]))
