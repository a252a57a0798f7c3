"""Any vision-side method on Hugging Face's tower, with dense attention maps: the oracle of how methods are served.

The methods themselves have oracles of their own (tests/reduction); here it is their place in the tower, the signals
they are shown, and the schedule.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ficoco_vllm.reduction import Signals, get
from ficoco_vllm.reduction.schedule import make_schedule
from tests.reference.algorithm1 import ReferenceLlava, Shown
from tests.reference.relevance import embedded, mean_cosines


class DenseLlava(ReferenceLlava):
    """Like the reference of FiCoCo-V, for a method by name.

    Attributes:
        question: about the image, for methods that compare them.
        clip: whose text encoder reads the question, in float64; None compares the language model's embeddings.
    """

    method: str
    settings: dict[str, Any]
    question: str = ""
    clip: Any = None
    clip_tokenizer: Any = None

    def relevance(self, features: Tensor) -> Tensor:
        """The mean cosine of each patch with the question, (1, N).

        Args:
            features: (N, D) output of the tower.
        """
        model = self.model.model
        if self.clip is None:
            said = embedded(self.question, self.processor, model.language_model)
            return mean_cosines(model.multi_modal_projector(features), said)
        ids = self.clip_tokenizer(self.question, add_special_tokens=False).input_ids
        room = self.clip.config.text_config.max_position_embeddings - 2
        first, last = self.clip_tokenizer("").input_ids
        parts = [[first, *ids[start : start + room], last] for start in range(0, len(ids), room)]
        read = [self.clip.get_text_features(torch.tensor([part])).pooler_output for part in parts]
        shown = self.clip.visual_projection(self.clip.vision_model.post_layernorm(features))
        return mean_cosines(shown, torch.cat(read))

    @torch.no_grad()
    def encode(self, pixels: Tensor, keep: int, shown: Shown) -> tuple[Tensor, list[int]]:
        """See `ReferenceLlava`."""
        tower = self.model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        vision, side = self.config.vision_config, self.side
        grid, N = (len(shown.rows), len(shown.columns)), len(shown.places)
        executed = vision.num_hidden_layers + self.config.vision_feature_layer + 1
        method = get(self.method)
        reducer = method.configure(**self.settings)
        removals = {}
        if method.site == "encoder":
            first = self.settings.get("start_layer", vision.num_hidden_layers * 11 // 24)
            layers = range(first, executed)
            schedule = self.settings.get("schedule", method.default_schedule)
            removals = make_schedule(schedule, N, keep, layers, reducer.num_extra, reducer.max_removed)
        starts = min((index for index, count in removals.items() if count), default=executed - 1)
        places = [0, *(1 + row * side + column for row, column in shown.places)]
        weighted = getattr(reducer.settings, "proportional_attention", False)
        shallow_layer, shallow = vision.num_hidden_layers * 5 // 24, None
        if "shallow_cls_attention" in reducer.signals:
            starts = shallow_layer
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        position, size = torch.arange(side * side)[None], torch.ones(1, side * side)
        for index in range(executed):
            if index == starts and keep < N:
                hidden, position, size = hidden[:, places], torch.arange(N)[None], torch.ones(1, N)
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
            shown_map = logits if getattr(reducer.settings, "attention", "probs") == "logits" else weights
            if index == shallow_layer:
                shallow = shown_map.mean(0)[None, 0, 1:]
            signals = Signals(
                visual_attention=shown_map.mean(0)[None, 1:, 1:],
                cls_attention=shown_map.mean(0)[None, 0, 1:],
                shallow_cls_attention=shallow,
                keys=key.mean(0)[None, 1:],
                position=position,
                grid=grid,
            )
            if removals.get(index):
                reduced = reducer(hidden[:, 1:], signals, removals[index], size)
                hidden, size, position = (
                    torch.cat([hidden[:, :1], reduced.tokens], 1),
                    reduced.size,
                    reduced.position,
                )
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        if method.site == "features" and keep < N:
            if "text_relevance" in reducer.signals:
                signals = replace(signals, text_relevance=self.relevance(hidden[0, 1:]))
            reduced = reducer(hidden[:, 1:], signals, N - keep + reducer.num_extra, size)
            hidden, position = torch.cat([hidden[:, :1], reduced.tokens], dim=1), reduced.position
        return (hidden, position[0].tolist()) if keep < N else (hidden[:, places], list(range(N)))
