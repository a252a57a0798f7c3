"""The parts of a reducing decoder layer's attention that a method needs.

The fused ops process all images of a group together, over several requests: one pass computes the softmax normalisers
of the needed queries and the row sums among the visual tokens, which yield the few rows and columns that a method
needs. No (H, N, N) tensor is written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ficoco_vllm import kernels
from ficoco_vllm.decoder.boundary import ImageGroup, Index
from ficoco_vllm.kernels import Backend
from ficoco_vllm.reduction.logits import LogitMap, mean_logits
from ficoco_vllm.reduction.signals import AttentionMap, via_text
from ficoco_vllm.vision.staging import to_device_together


@dataclass(frozen=True)
class DecoderHeads:
    """Queries and keys of all tokens of a step in one layer, after RoPE.

    Attributes:
        query: (tokens, H, d), any floating dtype; under tensor parallelism the heads of this worker.
        key: (tokens, H', d), H a multiple of H'.
        cached_key: (cached tokens, H', d), keys of earlier steps before the windows of this one; None without any.
        scale: factor of the logits.
        num_heads: number of heads of the whole model.
        all_reduce: sums over the workers; None with a single worker.
        backend: backend of the fused ops.
    """

    query: Tensor
    key: Tensor
    scale: float
    num_heads: int
    all_reduce: Callable[[Tensor], Tensor] | None = None
    backend: Backend = "auto"
    cached_key: Tensor | None = None

    @cached_property
    def context_key(self) -> Tensor:
        """Keys of earlier steps, then those of this one, (cached tokens + tokens, H', d)."""
        return self.key if self.cached_key is None else torch.cat([self.cached_key, self.key])

    def reduced(self, part: Tensor) -> Tensor:
        """The sum over the workers."""
        return part if self.all_reduce is None else self.all_reduce(part.contiguous())

    def mean_key(self, rows: Tensor) -> Tensor:
        """Head-mean keys, each key head weighted by its number of query heads.

        Args:
            rows: (B, N) int64.

        Returns:
            (B, N, d) fp32.
        """
        group = self.query.shape[1] // self.key.shape[1]
        return self.reduced(self.key[rows].float().sum(dim=2) * group).div_(self.num_heads)


class ImageAttention:
    """Attention of B images of one shape, among their tokens and from the text of their window after them.

    The queries are those of the step up to the window's end, or only those after the image if no visual one is needed.
    """

    def __init__(self, heads: DecoderHeads, group: ImageGroup, visual: bool, logits: bool = False) -> None:
        """Gather the queries and keys of the images.

        Args:
            heads: heads of all tokens.
            group: where the images lie, on the host.
            visual: whether attention among the visual tokens is needed, too.
            logits: return scaled products before mask and softmax instead.
        """
        self.heads, self.logits = heads, logits
        self.num_visual = group.visual.shape[1]
        device = heads.query.device
        self.with_visual = visual
        first = group.num_cached[:, None] if visual else group.visual_place[:, -1:] + 1
        length = group.text_place[:, -1:] + 1 - first  # the text is padded on the left and ends the window
        place = np.minimum(np.arange(int(length.max())), length - 1) + first
        row = group.visual[:, :1] - group.visual_place[:, :1]
        text = np.where(group.has_text, group.text_place - first, -1)
        arrays = [row + place, group.context, group.visual, group.visual_place, text]
        arrays += [first[:, 0], length[:, 0], group.visual_place - first]
        query, context, tokens, self.visual_place, self.text_index, *rest = to_device_together(arrays, device)
        self.query = _take(heads.query, arrays[0], query)
        self.context_key = _take(heads.context_key, group.context, context)
        self.key = _take(heads.key, group.visual, tokens)
        self.visual_query = _take(heads.query, group.visual, tokens) if visual else None
        # Whole prompts need no offset, so that fully masked tiles are skipped on any device.
        self.first = rest[0] if first.any() else None
        self.length = rest[1]
        self.visual_index = rest[2] if visual else None

    def text_attention(self) -> Tensor:
        """Head-mean attention of the text after each image to its tokens.

        Returns:
            (B, M, N) fp32, zeros where the text is padded.

        Source: arXiv:2411.17686, Sec. 2.3.
        """
        heads = self.heads
        if self.logits:
            index = self.text_index.clamp_min(0)[:, None, :, None]
            query = self.query.gather(2, index.expand(-1, *_heads_and_size(self.query)))
            logits = mean_logits(query, self.key, heads.scale, heads.num_heads, heads.all_reduce)
            return logits.masked_fill_((self.text_index < 0)[..., None], 0.0)
        # Text after an image sees all of it: nothing is masked.
        return heads.reduced(self._block(self.query, self.lse, self.text_index, None, causal=False))

    def visual_attention(self) -> AttentionMap:
        """Head-mean causal attention among the tokens of each image, computed on access."""
        if not self.logits:
            return VisualAttention(self)
        heads = self.heads
        assert self.visual_query is not None
        return LogitMap(self.visual_query, self.key, heads.scale, heads.num_heads, heads.all_reduce)

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp of the logits of each query, (B, H, S) fp32."""
        return self._stats[0]

    @property
    def visual_row_sum(self) -> Tensor:
        """Attention of each visual token to those of its image, summed, of this worker's heads, (B, N) fp32."""
        assert self.visual_index is not None
        return self._stats[1].gather(1, self.visual_index)

    @cached_property
    def visual_lse(self) -> Tensor:
        """Log-sum-exp of the logits of each visual token, (B, H, N) fp32."""
        assert self.visual_index is not None
        return self.lse.gather(2, self.visual_index[:, None].expand(-1, self.lse.shape[1], -1))

    @cached_property
    def _stats(self) -> tuple[Tensor, Tensor]:
        heads = self.heads
        weight = None
        if self.with_visual:
            weight = torch.zeros(
                (self.query.shape[0], self.context_key.shape[2]),
                dtype=torch.float32,
                device=self.query.device,
            ).scatter_(1, self.visual_place, 1.0)
        return kernels.softmax_stats(
            self.query,
            self.context_key,
            heads.scale,
            causal=True,
            offset=self.first,
            query_length=self.length,
            column_weight=weight,
            num_heads=heads.num_heads,
            backend=heads.backend,
        )

    def visual_block(
        self, source: Tensor | None, target: Tensor | None, text: Tensor | None = None, gamma: float = 1.0
    ) -> Tensor:
        """Chosen rows and columns among the visual tokens, of this worker's heads, (B, R, K) fp32."""
        assert self.visual_query is not None
        return self._block(self.visual_query, self.visual_lse, source, target, True, text, gamma)

    def _block(
        self,
        query: Tensor,
        lse: Tensor,
        rows: Tensor | None,
        columns: Tensor | None,
        causal: bool,
        text: Tensor | None = None,
        gamma: float = 1.0,
    ) -> Tensor:
        heads = self.heads
        return kernels.attention_block(
            query,
            self.key,
            lse,
            heads.scale,
            row_index=rows,
            column_index=columns,
            causal=causal,
            text=text,
            gamma=gamma,
            num_heads=heads.num_heads,
            backend=heads.backend,
        )


@dataclass(frozen=True)
class VisualAttention:
    """Head-mean causal attention among the tokens of each of B images (`AttentionMap`).

    Attributes:
        images: measured attention of the images.
    """

    images: ImageAttention

    @property
    def shape(self) -> torch.Size:
        """(B, N, N), the shape of the unwritten map."""
        N = self.images.num_visual
        return torch.Size((self.images.query.shape[0], N, N))

    def row_sum(self) -> Tensor:
        """Attention of each token to its image, summed, (B, N) fp64.

        Source: arXiv:2411.17686, Eq. 14, first term, times N.
        """
        return self.images.heads.reduced(self.images.visual_row_sum).double()

    def column_sum(self) -> Tensor:
        """Attention that each token receives from its image, summed, (B, N) fp32.

        Source: arXiv:2411.17686, Eq. 5.
        """
        images, heads = self.images, self.images.heads
        assert images.visual_query is not None
        received = kernels.attention_sums(
            images.visual_query,
            images.key,
            images.visual_lse,
            heads.scale,
            causal=True,
            num_heads=heads.num_heads,
            backend=heads.backend,
        )
        return heads.reduced(received)

    def block(self, source: Tensor, target: Tensor, text: Tensor | None = None, gamma: float = 1.0) -> Tensor:
        """Attention of chosen tokens to chosen tokens, and Eq. 15 where `text` is given.

        Args:
            source: (B, R) int64 into the N tokens.
            target: (B, K) int64.
            text: (B, M, N), see `via_text`, or None.
            gamma: weight of the direct term where `text` is given.

        Returns:
            (B, R, K) fp32.

        Source: arXiv:2411.17686, Eq. 15.
        """
        images = self.images
        if text is None or images.heads.all_reduce is None:
            return images.heads.reduced(images.visual_block(source, target, text, gamma))
        # Every worker has the whole text term, so it is added after the sum over the workers.
        direct = images.heads.reduced(images.visual_block(source, target))
        return via_text(direct, text, source, target, gamma)

    def dense(self) -> Tensor:
        """The whole map, (B, N, N) fp32."""
        return self.images.heads.reduced(self.images.visual_block(None, None))


def _heads_and_size(values: Tensor) -> tuple[int, int, int]:
    """Shape after B to which an index (B, 1, R, 1) into (B, H, S, d) expands, for any number of rows."""
    return values.shape[1], -1, values.shape[3]


def _take(values: Tensor, rows: Index, index: Tensor) -> Tensor:
    """Rows (B, H, S, d) of (tokens, H, d), on the host and on the device; a view for an image of contiguous rows."""
    if len(rows) == 1:
        start, length = int(rows[0, 0]), rows.shape[1]
        if np.array_equal(rows[0], np.arange(start, start + length)):
            return values[start : start + length].transpose(0, 1)[None]
    return values[index].transpose(1, 2)
