"""Any vision-side method on Hugging Face's tower, with dense attention maps: the oracle of how methods are served.

The methods themselves have oracles of their own (tests/reduction); here it is their place in the tower, the signals
they are shown, and the schedule.
"""

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ficoco_vllm.reduction import Signals, get
from ficoco_vllm.reduction.schedule import make_schedule
from tests.reference.algorithm1 import ReferenceLlava


class DenseLlava(ReferenceLlava):
    """Like the reference of FiCoCo-V, for a method by name."""

    method: str
    settings: dict[str, Any]

    @torch.no_grad()
    def features(self, image: Image.Image, keep: int) -> Tensor:
        """Projected visual tokens of one image, (keep, hidden size)."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"].double()
        tower = self.model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        executed = vision.num_hidden_layers + self.config.vision_feature_layer + 1
        method = get(self.method)
        reducer = method.configure(**self.settings)
        removals = {}
        if method.site == "encoder":
            first = self.settings.get("start_layer", vision.num_hidden_layers * 11 // 24)
            layers = range(first, executed)
            schedule = self.settings.get("schedule", method.default_schedule)
            removals = make_schedule(
                schedule, side * side, keep, layers, reducer.num_extra, reducer.max_removed
            )
        weighted = getattr(reducer.settings, "proportional_attention", False)
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        position, size = torch.arange(side * side)[None], torch.ones(1, side * side)
        for index in range(executed):
            layer = tower.encoder.layers[index]
            attention, x = layer.self_attn, layer.layer_norm1(hidden)
            query, key, value = (
                linear(x).view(x.shape[1], vision.num_attention_heads, -1).transpose(0, 1)
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            logits = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
            if weighted:
                logits[:, :, 1:] += size[0].log()
            weights = torch.softmax(logits, dim=-1)
            mixed = (weights @ value).transpose(0, 1).reshape(1, x.shape[1], -1)
            hidden = hidden + attention.out_proj(mixed)
            shown = logits if getattr(reducer.settings, "attention", "probs") == "logits" else weights
            signals = Signals(
                visual_attention=shown.mean(0)[None, 1:, 1:],
                cls_attention=shown.mean(0)[None, 0, 1:],
                keys=key.mean(0)[None, 1:],
                position=position,
                grid=(side, side),
            )
            if removals.get(index):
                reduced = reducer(hidden[:, 1:], signals, removals[index], size)
                hidden, size, position = (
                    torch.cat([hidden[:, :1], reduced.tokens], 1),
                    reduced.size,
                    reduced.position,
                )
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        if method.site == "features" and keep < side * side:
            reduced = reducer(hidden[:, 1:], signals, side * side - keep + reducer.num_extra, size)
            hidden = torch.cat([hidden[:, :1], reduced.tokens], dim=1)
        projected: Tensor = self.model.model.multi_modal_projector(hidden[0, 1:])
        return projected
