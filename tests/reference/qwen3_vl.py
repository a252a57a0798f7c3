"""Qwen3-VL with fewer visual tokens, written plainly on Hugging Face's model: the oracle of the served one.

A unit is the group of 2 x 2 patches that the patch merger turns into one token. Whole units leave; what leaves is
merged place by place: the upper left patch of a unit into upper left patches, and so on. There is no [CLS]: where a
method reads its attention, the attention that a unit receives on average takes its place.

All of it is float64. For FiCoCo-V nothing of ours is used; any other method brings its own rule and schedule.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm, rotate_half
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextRMSNorm

from ficoco_vllm.reduction import Signals, get
from ficoco_vllm.reduction.schedule import make_schedule
from tests.reference.algorithm1 import plain_norm, reduce_layer
from tests.reference.relevance import embedded, mean_cosines


class ReferenceQwen:
    """Hugging Face's Qwen3-VL whose tower is unrolled by hand, and whose positions follow the tokens that stay.

    Attributes:
        method: by name, for `encode`; None is FiCoCo-V as Algorithm 1 says.
        settings: of the method.
        question: about the image, for methods that compare them.
    """

    method: str | None = None
    settings: Mapping[str, Any] = {}
    question: str = ""

    def __init__(self, folder: Path) -> None:
        # Experts one by one: torch multiplies groups of matrices in no float64.
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
        self.model = model.eval().double()
        for module in self.model.modules():
            if isinstance(module, Qwen3VLTextRMSNorm | Qwen3VLMoeTextRMSNorm):
                module.forward = MethodType(plain_norm, module)
        rotary = self.model.model.language_model.rotary_emb
        rotary.forward = MethodType(_text_angles, rotary)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.config = self.model.config

    def grid(self, image: Image.Image) -> tuple[int, int]:
        """Rows and columns of units of an image without reduction."""
        _, rows, columns = self.processor.image_processor(image)["image_grid_thw"][0]
        return int(rows) // 2, int(columns) // 2

    @torch.no_grad()
    def encode(self, image: Image.Image, keep: int) -> tuple[Tensor, list[Tensor], list[int]]:
        """Run the tower.

        Args:
            image: of any size.
            keep: units that stay.

        Returns:
            (keep, D) visual tokens, their deepstack features, (keep, D) for each level, and the unit that each token
            was: its index in raster order, -1 for a fused one.
        """
        inputs = self.processor.image_processor(image, return_tensors="pt")
        rows, columns = self.grid(image)
        N, tower, vision = rows * columns, self.model.model.visual, self.config.vision_config
        heads, D = vision.num_heads, vision.hidden_size
        d = D // heads
        # Row and column of the patches: unit by unit, and within a unit row by row.
        places = [
            [
                (2 * (unit // columns) + row, 2 * (unit % columns) + column)
                for row in (0, 1)
                for column in (0, 1)
            ]
            for unit in range(N)
        ]
        patches = tower.patch_embed(inputs["pixel_values"].double())
        hidden = (patches + self._embedded_places(2 * rows, 2 * columns)).view(N, 4, D)
        reducer, removals = self._plan(N, keep)
        position, size = list(range(N)), torch.ones(1, N)
        levels: list[tuple[Tensor, list[int]]] = []
        for index, layer in enumerate(tower.blocks):
            count = len(position)
            x = layer.norm1(hidden.reshape(-1, D))
            query, key, value = layer.attn.qkv(x).view(4 * count, 3, heads, d).permute(1, 2, 0, 3)
            cos, sin = self._angles(
                [places[unit if unit >= 0 else _middle(rows, columns)] for unit in position]
            )
            query, key = (part * cos + rotate_half(part) * sin for part in (query, key))
            logits = query @ key.transpose(1, 2) * d**-0.5
            if reducer is not None and getattr(reducer.settings, "proportional_attention", False):
                logits += size[0].log().repeat_interleave(4)
            weights = torch.softmax(logits, dim=-1)
            mixed = (weights @ value).transpose(0, 1).reshape(4 * count, D)
            hidden = hidden + layer.attn.proj(mixed).view(count, 4, D)
            # From unit to unit: the mean over the patches that look, the sum over those that are looked at.
            attention = weights.mean(0).view(count, 4, count, 4).mean(1).sum(-1)
            keys = key.mean(0).view(count, 4, d).mean(1)
            state = (attention, keys, position, (rows, columns), size)
            if removals.get(index):
                hidden, position, size = self._reduce(reducer, hidden, removals[index], *state)
            hidden = hidden + layer.mlp(layer.norm2(hidden))
            if index in vision.deepstack_visual_indexes:
                merger = tower.deepstack_merger_list[vision.deepstack_visual_indexes.index(index)]
                levels.append((merger(hidden.reshape(-1, D)), position))
        if reducer is not None and reducer.method.site == "features" and keep < N:
            hidden, position, size = self._reduce(reducer, hidden, N - keep + reducer.num_extra, *state)
        # A fused unit has no features of its own at any level.
        deepstack = [
            torch.stack([features[held.index(unit)] if unit >= 0 else features[0] * 0 for unit in position])
            for features, held in levels
        ]
        return tower.merger(hidden.reshape(-1, D)), deepstack, position

    def _plan(self, N: int, keep: int) -> tuple[Any, dict[int, int]]:
        depth = self.config.vision_config.depth
        start = depth * 11 // 24
        if self.method is None:
            steps, lost = depth - start, N - keep
            return None, {start + i: lost // steps + (i < lost % steps) for i in range(steps)}
        method = get(self.method)
        reducer = method.configure(**self.settings)
        if method.site == "features":
            return reducer, {}
        layers = range(start, depth)
        return reducer, make_schedule(
            method.default_schedule, N, keep, layers, reducer.num_extra, reducer.max_removed
        )

    def _reduce(
        self,
        reducer: Any,
        hidden: Tensor,
        removed: int,
        attention: Tensor,
        keys: Tensor,
        position: list[int],
        grid: tuple[int, int],
        size: Tensor,
    ) -> tuple[Tensor, list[int], Tensor]:
        flat = hidden.flatten(1)
        received = attention.mean(0)
        if reducer is None:
            kept, position = reduce_layer(
                flat.numpy(), attention.numpy(), received.numpy(), position, grid[1], removed
            )
            return torch.from_numpy(np.ascontiguousarray(kept)).view(-1, *hidden.shape[1:]), position, size
        signals = Signals(
            visual_attention=attention[None],
            cls_attention=received[None],
            keys=keys[None],
            position=torch.tensor([position]),
            grid=grid,
        )
        if "text_relevance" in reducer.signals:
            model = self.model.model
            shown = model.visual.merger(hidden.reshape(-1, hidden.shape[-1]))
            said = embedded(self.question, self.processor, model.language_model)
            signals = replace(signals, text_relevance=mean_cosines(shown, said))
        reduced = reducer(flat[None], signals, removed, size)
        return reduced.tokens[0].view(-1, *hidden.shape[1:]), reduced.position[0].tolist(), reduced.size

    def _angles(self, places: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the patches at these places, (patches, head size)."""
        d = self.config.vision_config.hidden_size // self.config.vision_config.num_heads
        frequencies = 10000.0 ** -(torch.arange(0, d // 2, 2).double() / (d // 2))
        points = torch.tensor([place for unit in places for place in unit]).double()
        angles = (points[:, :, None] * frequencies).flatten(1)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def _embedded_places(self, rows: int, columns: int) -> Tensor:
        """Position embeddings of all patches, unit by unit: the square table, stretched linearly."""
        table = self.model.model.visual.pos_embed.weight
        side = int(len(table) ** 0.5)
        square = table.view(1, side, side, -1).permute(0, 3, 1, 2)
        stretched = torch.nn.functional.interpolate(
            square, (rows, columns), mode="bilinear", align_corners=True
        )[0].permute(1, 2, 0)
        return stretched.view(rows // 2, 2, columns // 2, 2, -1).transpose(1, 2).reshape(rows * columns, -1)

    @torch.no_grad()
    def generate(
        self, prompt: str, images: list[tuple[Image.Image, int]], num_tokens: int
    ) -> tuple[list[int], Tensor]:
        """Greedy answer, the whole sequence each step.

        Args:
            prompt: with one `<|image_pad|>` for each image.
            images: each with the number of units that stay.
            num_tokens: how many to generate.

        Returns:
            Tokens and log-probabilities (num_tokens, vocabulary), float64.
        """
        model, language_model = self.model.model, self.model.model.language_model
        encoded = [self.encode(image, keep) for image, keep in images]
        pad, grids = self.config.image_token_id, [self.grid(image) for image, _ in images]
        ids = self.processor.tokenizer(prompt, add_special_tokens=False).input_ids
        # The prompt before any reduction, and which of its tokens stay.
        whole: list[int] = []
        chosen: list[int] = []
        waiting = list(zip(encoded, grids, strict=True))
        for token in ids:
            if token != pad:
                chosen.append(len(whole))
                whole.append(token)
                continue
            (_, _, position), (rows, columns) = waiting.pop(0)
            chosen += [len(whole) + (unit if unit >= 0 else _middle(rows, columns)) for unit in position]
            whole += [pad] * (rows * columns)
        full = torch.tensor([whole])
        positions, _ = model.get_rope_index(
            full,
            (full == pad).int(),
            torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids]) if grids else None,
        )
        following = int(positions.max()) + 1
        positions = positions[:, :, chosen]
        kept = full[0, chosen]
        is_visual = kept == pad
        embeddings = language_model.embed_tokens(kept)
        levels = []
        if encoded:
            embeddings[is_visual] = torch.cat([tokens for tokens, _, _ in encoded])
            levels = [
                torch.cat(level) for level in zip(*(deepstack for _, deepstack, _ in encoded), strict=True)
            ]
        tokens: list[int] = []
        steps = []
        for step in range(num_tokens):
            hidden = language_model(
                inputs_embeds=embeddings[None],
                position_ids=positions,
                visual_pos_masks=is_visual[None],
                deepstack_visual_embeds=levels or None,
            ).last_hidden_state[0, -1]
            steps.append(torch.log_softmax(self.model.lm_head(hidden), dim=-1))
            tokens.append(int(steps[-1].argmax()))
            embeddings = torch.cat([embeddings, language_model.embed_tokens(torch.tensor(tokens[-1:]))])
            positions = torch.cat([positions, torch.full((3, 1, 1), following + step)], dim=2)
            is_visual = torch.cat([is_visual, torch.tensor([False])])
        return tokens, torch.stack(steps)


def _text_angles(rotary: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of Hugging Face's text positions, in float64."""
    angles = position_ids[..., None].double() * rotary.inv_freq.double()
    mixed = angles[0].clone()
    for dimension, section in ((1, rotary.mrope_section[1]), (2, rotary.mrope_section[2])):
        mixed[..., dimension : 3 * section : 3] = angles[dimension][..., dimension : 3 * section : 3]
    mixed = torch.cat([mixed, mixed], dim=-1)
    return mixed.cos(), mixed.sin()


def _middle(rows: int, columns: int) -> int:
    """The unit in the middle of a grid, where a fused one is."""
    return (rows - 1) // 2 * columns + (columns - 1) // 2
