"""FiCoCo-V written plainly on Hugging Face's LLaVA: the oracle of the served one. Nothing of ours is used here.

All of it is float64, unless a test wants to know what rounding alone does. The reference of the served float32 must
not have rounding errors of its own, and where scores nearly tie only float64 determines the tokens that leave.
"""

import math
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

LAM, EPSILON, COEFFICIENT, WINDOW = 0.35, 0.998, 2.0, 2


def reduce_layer(
    tokens: np.ndarray,
    attention: np.ndarray,
    cls_attention: np.ndarray,
    position: list[int],
    side: int,
    removed: int,
) -> tuple[np.ndarray, list[int]]:
    """Algorithm 1, line by line, for one image.

    Args:
        tokens: (N, D) hidden states of the patches.
        attention: (N, N), out of the softmax over all keys.
        cls_attention: (N,).
        position: index of each token in the original grid.
        side: columns of that grid.
        removed: how many tokens leave.
    """
    N = len(tokens)
    rows = attention.tolist()
    scores = [LAM * sum(rows[i]) / N - (1 - LAM) * cls_attention[i] for i in range(N)]  # line 2
    windows: dict[tuple[int, int], list[int]] = {}
    for i in range(N):  # line 3
        row, column = divmod(position[i], side)
        windows.setdefault((row // WINDOW, column // WINDOW), []).append(i)
    for members in windows.values():
        top = max(members, key=lambda i: scores[i])
        scores[top] = scores[top] * COEFFICIENT if scores[top] > 0 else scores[top] / COEFFICIENT
    ranked = sorted(range(N), key=lambda i: -scores[i])  # lines 4-5
    source, target = sorted(ranked[:removed]), sorted(ranked[removed:])
    total, weight = {j: tokens[j].copy() for j in target}, dict.fromkeys(target, 1.0)
    for i in source:
        row = sorted(rows[i][j] for j in target)  # line 9: quantile by linear interpolation
        place = EPSILON * (len(row) - 1)
        low = math.floor(place)
        high = min(low + 1, len(row) - 1)
        threshold = row[low] + (place - low) * (row[high] - row[low])
        chosen = [j for j in target if rows[i][j] >= threshold]  # line 10
        mass = sum(rows[i][j] for j in chosen)
        for j in chosen:  # lines 11-12
            alpha = rows[i][j] / mass
            total[j] += alpha * tokens[i]
            weight[j] += alpha
    kept = np.stack([total[j] / weight[j] for j in target])
    return kept, [position[j] for j in target]


def plain_norm(module: Any, hidden: Tensor) -> Tensor:
    """Hugging Face's RMS norm of any decoder, which always computes in float32."""
    squares = hidden.square().mean(dim=-1, keepdim=True)
    return module.weight * hidden / torch.sqrt(squares + module.variance_epsilon)


def decode(model: Any, embeddings: Tensor, num_tokens: int) -> tuple[list[int], Tensor]:
    """Greedy tokens of a model of transformers, without a cache.

    Args:
        model: with a language model and a head.
        embeddings: (1, S, D) of the prompt.
        num_tokens: to generate.

    Returns:
        Tokens and log-probabilities (num_tokens, vocabulary), float64.
    """
    language_model, tokens, rows = model.model.language_model, list[int](), list[Tensor]()
    for _ in range(num_tokens):
        hidden = language_model(inputs_embeds=embeddings).last_hidden_state[:, -1]
        rows.append(torch.log_softmax(model.lm_head(hidden)[0], dim=-1))
        tokens.append(int(rows[-1].argmax()))
        embedding = language_model.embed_tokens(torch.tensor([tokens[-1:]]))
        embeddings = torch.cat([embeddings, embedding], dim=1)
    return tokens, torch.stack(rows)


class Shown(NamedTuple):
    """The rows and the columns of a tile's patches that show the image; the others are padding."""

    rows: range
    columns: range

    @property
    def places(self) -> list[tuple[int, int]]:
        """Row and column of each of these patches, in raster order."""
        return [(row, column) for row in self.rows for column in self.columns]


class ReferenceLlava:
    """Hugging Face's LLaVA whose vision tower is unrolled by hand, with Algorithm 1 between attention and MLP."""

    model_class: Any = LlavaForConditionalGeneration

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.model = self.model_class.from_pretrained(folder, dtype=torch.float32).eval().to(dtype)
        for module in self.model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(plain_norm, module)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.config = self.model.config

    @property
    def side(self) -> int:
        """Rows and columns of patches that the tower sees."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size)

    @torch.no_grad()
    def features(self, image: Image.Image, keep: int) -> Tensor:
        """Projected visual tokens of one image, (keep, hidden size)."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"].to(self.dtype)
        hidden, _ = self.encode(pixels, keep, Shown(range(self.side), range(self.side)))
        skip = 0 if self.config.vision_feature_select_strategy == "full" else 1
        projected: Tensor = self.model.model.multi_modal_projector(hidden[0, skip:])
        return projected

    def encode(self, pixels: Tensor, keep: int, shown: Shown) -> tuple[Tensor, list[int]]:
        """Run the tower.

        Args:
            pixels: (1, 3, height, width).
            keep: patch tokens that are left.
            shown: the patches that are not padding, which leaves before the first layer that reduces.

        Returns:
            (1, 1 + keep, D), [CLS] first, and the place of each patch token among those that are shown.
        """
        tower = self.model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        vision, side = self.config.vision_config, self.side
        num_layers = vision.num_hidden_layers
        executed = num_layers + self.config.vision_feature_layer + 1
        start = num_layers * 11 // 24
        steps = executed - start
        places = [0, *(1 + row * side + column for row, column in shown.places)]
        lost = len(places) - 1 - keep
        removals = [lost // steps + (index < lost % steps) for index in range(steps)]
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        position = list(range(len(places) - 1))
        for index in range(executed):
            if index == start and lost:
                hidden = hidden[:, places]
            layer = tower.encoder.layers[index]
            attention = layer.self_attn
            x = layer.layer_norm1(hidden)
            heads = vision.num_attention_heads
            query, key, value = (
                linear(x).view(x.shape[1], heads, -1).transpose(0, 1)
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            logits = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
            weights = torch.softmax(logits, dim=-1)
            mixed = (weights @ value).transpose(0, 1).reshape(1, x.shape[1], -1)
            hidden = hidden + attention.out_proj(mixed)
            removed = removals[index - start] if index >= start else 0
            if removed:
                mean = weights.mean(0).numpy()
                kept, position = reduce_layer(
                    hidden[0, 1:].numpy(), mean[1:, 1:], mean[0, 1:], position, len(shown.columns), removed
                )
                hidden = torch.cat([hidden[:, :1], torch.from_numpy(kept)[None]], dim=1)
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        return hidden if lost else hidden[:, places], position

    @torch.no_grad()
    def generate(
        self, prompt: str, images: list[tuple[Image.Image, int]], num_tokens: int
    ) -> tuple[list[int], Tensor]:
        """Greedy answer, the whole sequence each step.

        Args:
            prompt: with one `<image>` for each image.
            images: each with its budget.
            num_tokens: how many to generate.

        Returns:
            Tokens and log-probabilities (num_tokens, vocabulary), float64.
        """
        table = self.model.model.language_model.embed_tokens
        ids = self.processor.tokenizer(prompt, add_special_tokens=False).input_ids
        pieces, waiting = [], list(images)
        for token in ids:
            if token == self.config.image_token_id:
                pieces.append(self.features(*waiting.pop(0)))
            else:
                pieces.append(table(torch.tensor([token])))
        return decode(self.model, torch.cat(pieces)[None], num_tokens)
