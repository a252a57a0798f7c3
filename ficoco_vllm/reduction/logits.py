"""Head-mean logits, an alternative to attention for some methods.

The mean over the heads of q_h . k_h is one product of the heads laid side by side: no softmax stands between, so no
head has to be computed separately and no kernel is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ficoco_vllm.kernels.gather import take_head_rows
from ficoco_vllm.reduction.signals import via_text


def mean_logits(
    query: Tensor,
    key: Tensor,
    scale: float,
    num_heads: int,
    all_reduce: Callable[[Tensor], Tensor] | None,
    bias: Tensor | None = None,
) -> Tensor:
    """Head-mean logits before mask and softmax.

    Args:
        query: (B, H, R, d), any floating dtype; under tensor parallelism the heads of this worker.
        key: (B, Hk, K, d), Hk divides H.
        scale: factor of the products.
        num_heads: number of heads of the whole model.
        all_reduce: sums over the workers; None where there is one.
        bias: (B, K) added to the logits of each key, or None.

    Returns:
        (B, R, K), fp64 if the inputs are, else fp32.

    Source: arXiv:2411.17686, Sec. 2.3 ("attention" of the authors' release).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    B, H, R, d = query.shape
    Hk = key.shape[1]
    grouped = query.to(dtype).reshape(B, Hk, H // Hk, R, d).sum(dim=2)
    wide = key.to(dtype).transpose(1, 2).flatten(2)
    total = torch.bmm(grouped.transpose(1, 2).flatten(2), wide.transpose(1, 2)).mul_(scale / num_heads)
    if all_reduce is not None:
        total = all_reduce(total)
    return total if bias is None else total.add_(bias[:, None].to(dtype))


@dataclass(frozen=True)
class LogitMap:
    """Head-mean logits among the visual tokens, as an `AttentionMap`.

    Attributes:
        query: (B, H, N, d), the heads of this worker.
        key: (B, Hk, N, d), of the same tokens.
        scale: factor of the products.
        num_heads: number of heads of the whole model.
        all_reduce: sums over the workers; None where there is one.
        bias: (B, N) added to the logits of each key, or None.
    """

    query: Tensor
    key: Tensor
    scale: float
    num_heads: int
    all_reduce: Callable[[Tensor], Tensor] | None
    bias: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(B, N, N)."""
        B, _, N, _ = self.query.shape
        return torch.Size((B, N, N))

    def row_sum(self) -> Tensor:
        """Sum over the keys, (B, N) fp64."""
        bias = None if self.bias is None else self.bias.double().sum(dim=1, keepdim=True)
        keys = self.key.sum(dim=2, keepdim=True, dtype=torch.float64)
        return self._logits(self.query.double(), keys, bias)[:, :, 0]

    def column_sum(self) -> Tensor:
        """Sum over the queries, (B, N) fp32."""
        bias = None if self.bias is None else self.bias.double() * self.query.shape[2]
        queries = self.query.sum(dim=2, keepdim=True, dtype=torch.float64)
        return self._logits(queries, self.key.double(), bias)[:, 0].float()

    def block(self, source: Tensor, target: Tensor, text: Tensor | None = None, gamma: float = 1.0) -> Tensor:
        """Chosen rows and columns, (B, R, K) fp32; see `AttentionMap`."""
        bias = None if self.bias is None else self.bias.gather(1, target)
        direct = self._logits(take_head_rows(self.query, source), take_head_rows(self.key, target), bias)
        return direct if text is None else via_text(direct, text, source, target, gamma)

    def dense(self) -> Tensor:
        """All of it, (B, N, N) fp32."""
        return self._logits(self.query, self.key, self.bias)

    def _logits(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        return mean_logits(query, key, self.scale, self.num_heads, self.all_reduce, bias)
