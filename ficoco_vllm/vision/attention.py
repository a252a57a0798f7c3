"""Attention of a reducing layer: its output, and what the methods want to know of it, without an (H, N, N) map."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

# Bounds the scratch space of the portable log-sum-exp: (B, H, N, N) fp32 is computed for so many bytes at a time.
_SCRATCH_BYTES = 256 * 2**20


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the logarithm of its normalisers.

    Args:
        query: (B, H, N, d), any floating dtype; `key` and `value` alike.
        key: see `query`.
        value: see `query`.
        scale: factor of the logits.
        bias: (B, N) added to the logits of each key, in the dtype of `query`, or None.

    Returns:
        Output (B, H, N, d) in the dtype of `query` and log-sum-exp (B, H, N) fp32.

    Source: arXiv:2411.17686, Eq. 2.
    """
    if query.device.type == "cpu":
        mask = None if bias is None else bias[:, None, None, :]
        # The kernel that scaled_dot_product_attention runs on a CPU; it hands out the normalisers for free.
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
        return output, lse
    return portable_attention_with_lse(query, key, value, scale, bias)


def portable_attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Like `attention_with_lse`, on any device, at the price of a second pass over the logits.

    Args:
        query: (B, H, N, d).
        key: see `query`.
        value: see `query`.
        scale: factor of the logits.
        bias: (B, N) or None.

    Returns:
        Output (B, H, N, d) and log-sum-exp (B, H, N) fp32.
    """
    mask = None if bias is None else bias[:, None, None, :]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    B, H, N, _ = query.shape
    step = max(1, _SCRATCH_BYTES // (4 * H * N * N))
    lse = torch.cat(
        [
            _logits(
                query[i : i + step], key[i : i + step], scale, None if bias is None else bias[i : i + step]
            ).logsumexp(dim=-1)
            for i in range(0, B, step)
        ]
    )
    return output, lse


def _logits(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Attention logits in fp32.

    Args:
        query: (B, H, M, d).
        key: (B, H, N, d).
        scale: factor.
        bias: (B, N) or None.

    Returns:
        (B, H, M, N) fp32.
    """
    logits = torch.matmul(query.float(), key.float().transpose(-1, -2)).mul_(scale)
    return logits if bias is None else logits.add_(bias[:, None, None, :].float())


@dataclass(frozen=True)
class ClipAttention:
    """Head-mean attention of one CLIP layer among its patch tokens, computed where it is looked at.

    Token 0 is [CLS] and takes part in every softmax, but in no row and no column that is handed out.

    Attributes:
        query: (B, H, 1 + N, d) the heads of this rank.
        key: (B, H, 1 + N, d).
        lse: (B, H, 1 + N) fp32 log-sum-exp of each query's logits.
        scale: factor of the logits.
        bias: (B, 1 + N) added to the logits of each key, or None.
        head_mean: turns the sum over this rank's heads into the mean over all heads (a reduction over the
            ranks, under tensor parallelism).
        logits: hand out logits before the softmax, as the authors' release of FiCoCo does, instead of
            probabilities.
    """

    query: Tensor
    key: Tensor
    lse: Tensor
    scale: float
    bias: Tensor | None
    head_mean: Callable[[Tensor], Tensor]
    logits: bool = False

    @property
    def shape(self) -> torch.Size:
        """(B, N, N), as the map would have if it were written."""
        B, _, N, _ = self.query.shape
        return torch.Size((B, N - 1, N - 1))

    @cached_property
    def _float_key(self) -> Tensor:
        # Scores decide what stays, so they are computed in fp32; every score reads the keys.
        return self.key.float()

    def _block(self, query: Tensor, lse: Tensor, keys: slice) -> Tensor:
        bias = None if self.bias is None else self.bias[:, keys]
        values = _logits(query, self._float_key[:, :, keys], self.scale, bias)
        if not self.logits:
            values = values.sub_(lse[..., None]).exp_()
        return self.head_mean(values.sum(dim=1))

    def row_sum(self) -> Tensor:
        """What each token draws from the patches: one minus its attention to [CLS] (for logits, their sum).

        Returns:
            (B, N) fp64: next to 1 fp32 would round away what tells the tokens apart.

        Source: arXiv:2411.17686, Eq. 11, first term, times N.
        """
        if self.logits:
            return self.dense().sum(dim=-1, dtype=torch.float64)
        to_cls = self._block(self.query[:, :, 1:], self.lse[:, :, 1:], slice(0, 1))
        return 1.0 - to_cls[..., 0].double()

    def rows(self, index: Tensor) -> Tensor:
        """Attention of chosen tokens to every patch token.

        Args:
            index: (B, R) int64 into the N patch tokens.

        Returns:
            (B, R, N) fp32.
        """
        B, H, _, d = self.query.shape
        chosen = (index + 1)[:, None, :].expand(B, H, -1)
        query = self.query.gather(2, chosen[..., None].expand(-1, -1, -1, d))
        return self._block(query, self.lse.gather(2, chosen), slice(1, None))

    def dense(self) -> Tensor:
        """The whole map.

        Returns:
            (B, N, N) fp32.
        """
        return self._block(self.query[:, :, 1:], self.lse[:, :, 1:], slice(1, None))

    def cls_attention(self) -> Tensor:
        """Attention of [CLS] to each patch token.

        Returns:
            (B, N) fp32.

        Source: arXiv:2411.17686, Eq. 4.
        """
        return self._block(self.query[:, :, :1], self.lse[:, :, :1], slice(1, None))[:, 0]

    def keys(self) -> Tensor:
        """Head-mean keys of the patch tokens.

        Returns:
            (B, N, d) fp32.
        """
        return self.head_mean(self._float_key[:, :, 1:].sum(dim=1))
