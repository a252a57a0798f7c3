"""vLLM's tower of Qwen3-VL as `encode` runs it: no [CLS], units of 2 x 2 patches, places by rotation, deepstack."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
from vllm.model_executor.models.qwen3_vl import Qwen3_VisionBlock, Qwen3_VisionTransformer

from ficoco_vllm.reduction.signals import take
from ficoco_vllm.vision.cpu_attention import is_faster
from ficoco_vllm.vision.cpu_layer import in_parts
from ficoco_vllm.vision.tower import Tokens, Tower


@dataclass(frozen=True)
class Merged(Tokens):
    """Tokens of the language model: `hidden` is (B, K, D), one row for each unit."""

    def split(self, unit: int) -> tuple[Tensor, Tensor]:
        """See `Tokens`."""
        return self.hidden[:, :0], self.hidden


@dataclass
class _Frame:
    """State of the remaining units that the layers need.

    Attributes:
        visual: vLLM's tower.
        cos: (B * N, d / 2) of the angles by which the patches are rotated.
        sin: see `cos`.
        num_images: B.
    """

    visual: Qwen3_VisionTransformer
    cos: Tensor
    sin: Tensor
    num_images: int

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Further arguments of vLLM's layers."""
        visual, num_patches = self.visual, len(self.cos) // self.num_images
        ends = np.arange(self.num_images + 1, dtype=np.int32) * num_patches
        backend, device = visual.attn_backend, self.cos.device
        return {
            "cu_seqlens": MMEncoderAttention.maybe_recompute_cu_seqlens(
                backend,
                ends,
                visual.hidden_size,
                visual.tp_size,
                device,
                fp8_padded_hidden_size=visual.fp8_padded_hidden_size,
            ),
            "rotary_pos_emb_cos": self.cos,
            "rotary_pos_emb_sin": self.sin,
            "max_seqlen": torch.tensor(
                MMEncoderAttention.compute_max_seqlen(backend, ends), dtype=torch.int32
            ),
            "sequence_lengths": MMEncoderAttention.maybe_compute_seq_lens(backend, ends, device),
        }


@dataclass(frozen=True)
class QwenLayer:
    """One layer (`EncoderLayer`).

    Attributes:
        tower: the tower that it belongs to.
        index: in the tower.
        frame: units that enter it.
    """

    tower: "QwenTower"
    index: int
    frame: _Frame

    @property
    def layer(self) -> Qwen3_VisionBlock:
        """The layer that vLLM built."""
        return self.tower.visual.blocks[self.index]

    @property
    def scale(self) -> float:
        """See `EncoderLayer`."""
        return float(self.layer.attn.hidden_size_per_attention_head**-0.5)

    @property
    def num_heads(self) -> int:
        """See `EncoderLayer`."""
        attention = self.layer.attn
        return int(attention.num_attention_heads_per_partition * attention.tp_size)

    @property
    def all_reduce(self) -> Callable[[Tensor], Tensor] | None:
        """See `EncoderLayer`."""
        return tensor_model_parallel_all_reduce if self.layer.attn.tp_size > 1 else None

    def whole(self, hidden: Tensor) -> Tensor:
        """See `EncoderLayer`; in vLLM's own code, unless ours is faster."""
        if is_faster(hidden):
            return in_parts(self, hidden)
        B, N, D = hidden.shape
        output: Tensor = self.layer(hidden.reshape(B * N, 1, D), **self.frame.arguments).view(B, N, D)
        self.tower.note_level(self.index, output)
        return output

    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `EncoderLayer`; the heads of this rank, queries and keys rotated."""
        attention = self.layer.attn
        B, N, _ = hidden.shape
        heads = (attention.num_attention_heads_per_partition, attention.hidden_size_per_attention_head)
        qkv = attention.qkv(self.layer.norm1(hidden))[0].view(B * N, 3, *heads)
        pair = qkv[:, :2].transpose(0, 1).contiguous()
        rotated = attention.apply_rotary_emb(pair, self.frame.cos, self.frame.sin).view(2, B, N, *heads)
        query, key = rotated.transpose(2, 3).unbind(0)
        return query, key, qkv[:, 2].view(B, N, *heads).transpose(1, 2)

    def project(self, mixed: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        projected: Tensor = self.layer.attn.proj(mixed)[0]
        return projected

    def mlp(self, hidden: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        output: Tensor = self.layer.mlp(self.layer.norm2(hidden))
        self.tower.note_level(self.index, hidden + output)
        return output


class QwenTower(Tower):
    """The tower over images of one grid; for one run, whose deepstack features it holds.

    Attributes:
        visual: vLLM's tower.
        grid: rows and columns of units.
        position: (B, U) of the units that are left, see `Tokens`.
        levels: deepstack features of each level that has been passed, (B, U, hidden size of the language model), and
            the positions of their units.
    """

    has_cls = False

    def __init__(self, visual: Qwen3_VisionTransformer, grid: tuple[int, int]) -> None:
        """Share the modules of a tower.

        Args:
            visual: vLLM's.
            grid: rows and columns of units.
        """
        self.visual = visual
        self.grid = grid
        self.unit = visual.spatial_merge_unit
        self.levels: list[tuple[Tensor, Tensor]] = []

    @property
    def num_layers(self) -> int:
        """See `Tower`."""
        return len(self.visual.blocks)

    def embed(self, pixels: Tensor) -> Tensor:
        """See `Tower`.

        Args:
            pixels: (B, N, values of a patch).
        """
        visual, (B, N, _) = self.visual, pixels.shape
        rows, columns = (side * visual.spatial_merge_size for side in self.grid)
        patches = visual.patch_embed(visual.input_norm(pixels.reshape(B * N, -1), visual.dtype))
        places = visual.fast_pos_embed_interpolate([[1, rows, columns]])
        embedded: Tensor = patches.view(B, N, -1) + places
        return embedded

    def layers_at(self, position: Tensor) -> Sequence[QwenLayer]:
        """See `Tower`."""
        self.position = position
        side = self.visual.spatial_merge_size
        unit = self.unit_of(position)[..., None]
        within = torch.arange(self.unit, device=position.device)
        rows = unit // self.grid[1] * side + within // side
        columns = unit % self.grid[1] * side + within % side
        places = torch.stack([rows, columns], dim=-1).flatten(0, 2)
        cos, sin = self.visual.rotary_pos_emb.get_cos_sin(max(self.grid) * side)
        frame = _Frame(self.visual, cos[places].flatten(1), sin[places].flatten(1), len(position))
        return [QwenLayer(self, index, frame) for index in range(self.num_layers)]

    def unit_of(self, position: Tensor) -> Tensor:
        """Index of the unit where a token is: its own, or the one in the middle of the grid for a fused token.

        Args:
            position: any shape, int64 index in the grid, -1 for a fused token.

        Deviation: no source says where a fused token is among others; the middle is nearest to all of them.
        """
        rows, columns = self.grid
        return torch.where(position < 0, (rows - 1) // 2 * columns + (columns - 1) // 2, position)

    def note_level(self, index: int, hidden: Tensor) -> None:
        """Compute the deepstack features of a layer that has a level.

        Args:
            index: index of the layer.
            hidden: (B, U * unit, D) its output.
        """
        visual = self.visual
        if index in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(index)]
            features = merger(hidden.reshape(-1, hidden.shape[-1]))
            self.levels.append((features.view(*self.position.shape, -1), self.position))

    def merged(self, tokens: Tokens) -> Tensor:
        """Tokens of the language model with their deepstack features, as vLLM's tower returns them.

        The deepstack features of units that have left are dropped; a fused unit has none, which adds nothing.

        Args:
            tokens: that are left at the end.

        Returns:
            (B, K, (1 + levels) * hidden size of the language model).
        """
        B, K = tokens.position.shape
        parts = [self.visual.merger(tokens.hidden.reshape(-1, tokens.hidden.shape[-1])).view(B, K, -1)]
        num_units = self.grid[0] * self.grid[1]
        for features, held in self.levels:
            # Where each unit is among those of the level; the last column is for fused ones.
            index = held.new_zeros((B, num_units + 1))
            index.scatter_(
                1,
                torch.where(held < 0, num_units, held),
                torch.arange(held.shape[1], device=held.device).expand(B, -1),
            )
            own = take(
                features, index.gather(1, torch.where(tokens.position < 0, num_units, tokens.position))
            )
            parts.append(own * (tokens.position >= 0)[..., None])
        return torch.cat(parts, dim=-1)
