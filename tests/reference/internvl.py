"""Methods of the tower written plainly on Hugging Face's InternVL, in float64: the oracle of the served one.

Units are lists of four patches by their place in the image; nothing is reordered. FiCoCo-V is Algorithm 1 of
`algorithm1.py`; for other methods the method itself is ours (its oracle is in tests/reduction), on dense maps.
"""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, InternVLForConditionalGeneration
from transformers.models.internvl.modeling_internvl import InternVLVisionRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from ficoco_vllm.reduction import Signals, get
from ficoco_vllm.reduction.schedule import make_schedule
from tests.reference.algorithm1 import decode, plain_norm, reduce_layer
from tests.reference.relevance import embedded, mean_cosines
from tests.support.random_internvl import IMAGE


class ReferenceInternVL:
    """Hugging Face's InternVL whose vision tower is unrolled by hand; the decoder is its own.

    Attributes:
        method: by name.
        settings: of the method.
        question: about the image, for methods that compare them.
        per_image: whether tiles share a budget.
    """

    question: str = ""

    def __init__(self, folder: Path) -> None:
        # Experts one by one: torch multiplies groups of matrices in no float64.
        model = InternVLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
        self.model = model.double().eval()
        for module in self.model.modules():
            if isinstance(module, InternVLVisionRMSNorm | Qwen2RMSNorm | Qwen3MoeRMSNorm):
                module.forward = MethodType(plain_norm, module)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.config = self.model.config
        self.method, self.settings, self.per_image = "ficoco-v", dict[str, Any](), False

    def pixels(self, image: Image.Image) -> Tensor:
        """Pixel values of an image's tiles, (tiles, 3, height, width) float64."""
        text = {"text": IMAGE, "images": image, "return_tensors": "pt"}
        return self.processor(**text)["pixel_values"].double()

    @torch.no_grad()
    def features(self, image: Image.Image, keep: int) -> Tensor:
        """Projected visual tokens of one image, tile after tile."""
        pixels = self.pixels(image)
        side = self.config.vision_config.image_size[0] // self.config.vision_config.patch_size[0] // 2
        keeps = [min(keep, side * side)] * len(pixels)
        if self.per_image:
            exact = [Fraction(min(keep, len(pixels) * side * side), len(pixels))] * len(pixels)
            keeps = [int(share) for share in exact]
            for index in range(min(keep, len(pixels) * side * side) - sum(keeps)):
                keeps[index] += 1
        kept = [
            self.tile(tile[None], count, side) for tile, count in zip(pixels, keeps, strict=True) if count
        ]
        projected: Tensor = self.model.model.multi_modal_projector(torch.cat(kept)[None])[0]
        return projected

    def tile(self, pixels: Tensor, keep: int, side: int) -> Tensor:
        """The units of one tile, (keep, 4 * D).

        Args:
            pixels: (1, 3, height, width).
            keep: units that are left.
            side: rows and columns of units.
        """
        tower, vision = self.model.model.vision_tower, self.config.vision_config
        places = [(row, column) for row in range(side) for column in range(side)]
        # The place of each patch among the hidden states, where [CLS] is 0.
        units = [
            [1 + (2 * row + down) * 2 * side + 2 * column + right for down in (0, 1) for right in (0, 1)]
            for row, column in places
        ]
        method, depth = get(self.method), vision.num_hidden_layers
        reducer = method.configure(**self.settings)
        removals: dict[int, int] = {}
        if method.site == "encoder":
            schedule = self.settings.get("schedule", method.default_schedule)
            layers = range(self.settings.get("start_layer", depth * 11 // 24), depth)
            removals = make_schedule(
                schedule, side * side, keep, layers, reducer.num_extra, reducer.max_removed
            )
        size, position = torch.ones(1, side * side), torch.arange(side * side)[None]
        hidden = tower.embeddings(pixels)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        for index, layer in enumerate(tower.encoder.layer):
            attention, x = layer.attention, layer.layernorm_before(hidden)
            query, key, value = (
                part.view(x.shape[1], vision.num_attention_heads, -1).transpose(0, 1)
                for part in (
                    attention.q_norm(attention.q_proj(x)),
                    attention.k_norm(attention.k_proj(x)),
                    attention.v_proj(x),
                )
            )
            logits = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
            if getattr(reducer.settings, "proportional_attention", False):
                for patches, count in zip(units, size[0], strict=True):
                    logits[:, :, patches] += count.log()
            weights = torch.softmax(logits, dim=-1)
            mixed = (weights @ value).transpose(0, 1).reshape(1, x.shape[1], -1)
            hidden = hidden + layer.lambda_1 * attention.projection_layer(mixed)
            seen = logits if getattr(reducer.settings, "attention", "probs") == "logits" else weights
            signals = self._signals(seen.mean(0), key.mean(0), units, position, side)
            if removals.get(index):
                tokens = self._joined(hidden, units)
                if self.method == "ficoco-v" and not self.settings:
                    kept, left = reduce_layer(
                        tokens[0].numpy(),
                        signals.visual_attention[0].numpy(),
                        signals.cls_attention[0].numpy(),
                        position[0].tolist(),
                        side,
                        removals[index],
                    )
                    tokens, position = torch.from_numpy(kept)[None], torch.tensor([left])
                    size = torch.ones(1, len(left))
                else:
                    tokens, size, position = reducer(tokens, signals, removals[index], size)
                hidden = torch.cat([hidden[:, :1], tokens.reshape(1, -1, hidden.shape[2])], dim=1)
                units = [list(range(1 + 4 * unit, 5 + 4 * unit)) for unit in range(tokens.shape[1])]
            hidden = hidden + layer.lambda_2 * layer.mlp(layer.layernorm_after(hidden))
        tokens = self._joined(tower.layernorm(hidden), units)
        if method.site == "features" and keep < side * side:
            if "text_relevance" in reducer.signals:
                said = embedded(self.question, self.processor, self.model.model.language_model)
                shown = self.model.model.multi_modal_projector(tokens)[0]
                signals = replace(signals, text_relevance=mean_cosines(shown, said))
            tokens, _, _ = reducer(tokens, signals, side * side - keep + reducer.num_extra, size)
        return tokens[0]

    def _joined(self, hidden: Tensor, units: list[list[int]]) -> Tensor:
        """(1, U, 4 * D)."""
        return torch.stack([torch.cat([hidden[0, patch] for patch in patches]) for patches in units])[None]

    def _signals(
        self, seen: Tensor, key: Tensor, units: list[list[int]], position: Tensor, side: int
    ) -> Signals:
        """Attention to a unit is the sum over its patches, attention of a unit and its key are the mean."""
        received = torch.stack([seen[:, patches].sum(dim=1) for patches in units], dim=1)
        return Signals(
            visual_attention=torch.stack([received[patches].mean(dim=0) for patches in units])[None],
            cls_attention=received[:1],
            keys=torch.stack([key[patches].mean(dim=0) for patches in units])[None],
            position=position,
            grid=(side, side),
        )

    @torch.no_grad()
    def generate(
        self, prompt: str, images: list[tuple[Image.Image, int]], num_tokens: int
    ) -> tuple[list[int], Tensor]:
        """Greedy answer, the whole sequence each step.

        Args:
            prompt: with one `IMAGE` for each image.
            images: each with its budget.
            num_tokens: how many to generate.

        Returns:
            Tokens and log-probabilities (num_tokens, vocabulary), float64.
        """
        table, tokenizer = self.model.model.language_model.embed_tokens, self.processor.tokenizer
        pieces, waiting = [], list(images)
        for token in tokenizer(prompt, add_special_tokens=False).input_ids:
            if token == self.config.image_token_id:
                around = tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
                start, end = table(torch.tensor(around)).split(1)
                pieces += [start, self.features(*waiting.pop(0)), end]
            else:
                pieces.append(table(torch.tensor([token])))
        return decode(self.model, torch.cat(pieces)[None], num_tokens)
