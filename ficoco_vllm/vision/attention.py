"""Attention of a reducing layer: its output, and the signals measured from it without an (H, N, N) map."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from ficoco_vllm import kernels
from ficoco_vllm.kernels import Backend
from ficoco_vllm.kernels.gather import take_head_rows
from ficoco_vllm.reduction.logits import LogitMap, mean_logits
from ficoco_vllm.reduction.signals import AttentionMap, via_text
from ficoco_vllm.vision.cpu_attention import HeadSums, attention_rows

# The columns of a bias are padded to a multiple of this.
_BIAS_COLUMNS = 16


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention, and the logarithm of its normalisers where the kernel returns them.

    Args:
        query: (B, H, N, d), any floating dtype; the same for `key` and `value`.
        key: see `query`.
        value: see `query`.
        scale: factor of the logits.
        bias: (B, N) added to the logits of each key, in the dtype of `query`, or None.

    Returns:
        Output (B, H, N, d) in the dtype of `query` and log-sum-exp (B, H, N) fp32; None where the device has no kernel
        that returns it for these shapes.

    Source: arXiv:2411.17686, Eq. 2.
    """
    mask = None if bias is None else bias[:, None, None, :]
    if query.device.type == "cpu":
        # The CPU kernel of scaled_dot_product_attention also returns the normalisers, at no cost.
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
        return output, lse.float()  # of float64 it returns float64
    B, H, N, _ = query.shape
    params = SDPAParams(query, key, value, mask, 0.0, False, False)
    if can_use_flash_attention(params):
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, False, False, scale=scale
        )
        return output, lse
    if can_use_efficient_attention(params):
        if bias is not None:
            # The kernel wants rows of the bias aligned to 16 bytes.
            mask = F.pad(bias, (0, -N % _BIAS_COLUMNS))[:, None, None, :N].expand(B, H, N, N)
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, 0.0, False, scale=scale
        )
        return output, lse[:, :, :N]  # it pads the rows to a multiple of 32
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale), None


@dataclass(frozen=True)
class ClipHeads:
    """Queries and keys of one tower layer, and the signals measured from them.

    Token 0 is [CLS] and takes part in every softmax, but not in the rows and columns that are returned. A tower without
    [CLS] has N tokens wherever 1 + N are named.

    Attributes:
        query: (B, H, 1 + N, d) the heads of this rank.
        key: (B, H, 1 + N, d).
        given_lse: (B, H, 1 + N) fp32 log-sum-exp of each query's logits, where the attention returned it; None computes
            it for the queries that are needed.
        scale: factor of the logits.
        bias: (B, 1 + N) added to the logits of each key, or None.
        num_heads: number of heads of the whole model.
        all_reduce: sums over the ranks, under tensor parallelism; else None.
        needed: the signals that the method reads, so that one pass serves several.
        logits: measure logits before the softmax, as the authors' release of FiCoCo does, instead of
            probabilities.
        backend: backend of the fused ops.
        has_cls: whether token 0 is [CLS].
        given_sums: sums over the heads of this rank, where the attention returned them instead of normalisers, or None.
    """

    query: Tensor
    key: Tensor
    given_lse: Tensor | None
    scale: float
    bias: Tensor | None
    num_heads: int
    all_reduce: Callable[[Tensor], Tensor] | None = None
    needed: frozenset[str] = frozenset({"visual_attention", "cls_attention", "keys"})
    logits: bool = False
    backend: Backend = "auto"
    has_cls: bool = True
    given_sums: HeadSums | None = None

    @property
    def patches(self) -> slice:
        """The patch tokens among all."""
        return slice(int(self.has_cls), None)

    def visual_attention(self) -> AttentionMap:
        """Head-mean attention among the patch tokens, (B, N, N), computed on demand."""
        if not self.logits:
            return ClipAttention(self)
        query, key = self.query[:, :, self.patches], self.key[:, :, self.patches]
        bias = None if self.bias is None else self.bias[:, self.patches]
        return LogitMap(query, key, self.scale, self.num_heads, self.all_reduce, bias)

    def cls_attention(self) -> Tensor:
        """Attention of [CLS] to each patch token.

        Returns:
            (B, N) fp32.

        Deviation: without [CLS] it is the mean attention that each patch token receives from all.

        Source: arXiv:2411.17686, Eq. 4.
        """
        if not self.has_cls:
            return self.visual_attention().column_sum() / self.query.shape[2]
        if self.logits:
            query, key = self.query[:, :, :1], self.key[:, :, 1:]
            bias = None if self.bias is None else self.bias[:, 1:]
            return mean_logits(query, key, self.scale, self.num_heads, self.all_reduce, bias)[:, 0]
        if self.given_sums is not None or self.needed & {"visual_attention", "keys"}:
            return self.sums[1][:, 1:]
        # One row of the map needs all keys, but no other query.
        cls = self.query[:, :, :1]
        lse = self._normalisers(cls) if self.given_lse is None else self.given_lse[:, :, :1]
        return self.reduced(self.map_rows(cls, lse))[:, 0, 1:]

    def keys(self) -> Tensor:
        """Head-mean keys of the patch tokens.

        Returns:
            (B, N, d) fp32.

        Source: arXiv:2411.17686, Eq. 6.
        """
        in_pass = self.has_cls and not self.logits and self.given_sums is None
        if in_pass and "keys" in self.needed and len(self.needed) > 1:
            return self.reduced(self._pass[2][:, 1:])
        total = self.key[:, :, self.patches].float().sum(dim=1)
        return self.reduced(total).div_(self.num_heads)

    def map_rows(self, query: Tensor, lse: Tensor) -> Tensor:
        """Rows of the map, [CLS] among the columns, of the heads of this rank, (B, M, 1 + N) fp32."""
        return kernels.attention_block(
            query,
            self.key,
            lse,
            self.scale,
            bias=self.bias,
            num_heads=self.num_heads,
            backend=self.backend,
        )

    def reduced(self, head_sum: Tensor) -> Tensor:
        """Sum over the ranks: each sees its own heads only, and all must choose the same tokens."""
        return head_sum if self.all_reduce is None else self.all_reduce(head_sum.contiguous())

    @cached_property
    def lse(self) -> Tensor:
        """Log-sum-exp of each query's logits, (B, H, 1 + N) fp32."""
        return self._normalisers(self.query) if self.given_lse is None else self.given_lse

    def _normalisers(self, query: Tensor) -> Tensor:
        return kernels.softmax_stats(query, self.key, self.scale, bias=self.bias, backend=self.backend)[0]

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Attention of each token to all but [CLS], (B, 1 + N) fp64, and of [CLS] to each token, (B, 1 + N) fp32."""
        if self.given_sums is not None and self.given_sums.first is not None:
            to_cls, from_cls = self.reduced(self.given_sums.first / self.num_heads).unbind()
            return 1.0 - to_cls.double(), from_cls
        to_others, from_cls, _ = self._pass
        if self.all_reduce is not None:
            to_cls = (
                1.0 - to_others
            ).float()  # of the heads of this rank, which the sum over the ranks completes
            to_cls, from_cls = self.reduced(torch.stack([to_cls, from_cls])).unbind()
            to_others = 1.0 - to_cls.double()
        return to_others, from_cls

    @cached_property
    def _pass(self) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.cls_scores(
            self.query,
            self.key,
            self.lse,
            self.scale,
            bias=self.bias,
            with_keys="keys" in self.needed,
            num_heads=self.num_heads,
            backend=self.backend,
        )


@dataclass(frozen=True)
class ClipAttention:
    """Head-mean attention of one CLIP layer among its patch tokens (`AttentionMap`).

    Attributes:
        heads: heads of the layer.
    """

    heads: ClipHeads

    @property
    def shape(self) -> torch.Size:
        """(B, N, N)."""
        B, _, N, _ = self.heads.query.shape
        N -= self.heads.has_cls
        return torch.Size((B, N, N))

    def row_sum(self) -> Tensor:
        """Attention of each token to all patches, which are all but [CLS].

        Returns:
            (B, N) fp64: close to 1 fp32 rounds away the differences between tokens.

        Source: arXiv:2411.17686, Eq. 11, first term, times N.
        """
        if not self.heads.has_cls:
            return self.heads.query.new_ones(self.shape[:2], dtype=torch.float64)
        return self.heads.sums[0][:, 1:]

    def column_sum(self) -> Tensor:
        """Attention that each token receives from all patches.

        Returns:
            (B, N) fp32.

        Source: arXiv:2411.17686, Eq. 5.
        """
        heads = self.heads
        if heads.given_sums is not None and heads.given_sums.received is not None:
            return heads.reduced(heads.given_sums.received / heads.num_heads)
        received = kernels.attention_sums(
            heads.query[:, :, heads.patches],
            heads.key,
            heads.lse[:, :, heads.patches],
            heads.scale,
            bias=heads.bias,
            num_heads=heads.num_heads,
            backend=heads.backend,
        )
        return heads.reduced(received)[:, heads.patches]

    def block(self, source: Tensor, target: Tensor, text: Tensor | None = None, gamma: float = 1.0) -> Tensor:
        """Attention of chosen tokens to chosen tokens.

        Args:
            source: (B, R) int64 into the N patch tokens.
            target: (B, K) int64.
            text: (B, M, N), see `via_text`, or None.
            gamma: weight of the direct term where `text` is given.

        Returns:
            (B, R, K) fp32.

        Source: arXiv:2411.17686, Eq. 12.
        """
        heads = self.heads
        query, key = heads.query[:, :, heads.patches], heads.key[:, :, heads.patches]
        if heads.given_sums is not None:
            rows = attention_rows(take_head_rows(query, source), heads.given_sums.keys).div_(heads.num_heads)
            columns = target[:, None].expand(-1, source.shape[1], -1)
            direct = heads.reduced(rows[:, :, heads.patches].gather(2, columns))
        else:
            # The normalisers are known, so [CLS] need not be among the keys: the indices stay as they are.
            direct = heads.reduced(
                kernels.attention_block(
                    query,
                    key,
                    heads.lse[:, :, heads.patches],
                    heads.scale,
                    row_index=source,
                    column_index=target,
                    bias=None if heads.bias is None else heads.bias[:, heads.patches],
                    num_heads=heads.num_heads,
                    backend=heads.backend,
                )
            )
        return direct if text is None else via_text(direct, text, source, target, gamma)

    def dense(self) -> Tensor:
        """The whole map.

        Returns:
            (B, N, N) fp32.
        """
        heads = self.heads
        return heads.reduced(
            heads.map_rows(heads.query[:, :, heads.patches], heads.lse[:, :, heads.patches])
        )[:, :, heads.patches]
