"""The attention of a reducing decoder layer, as far as the methods look at it.

The two blocks that the methods read, text to visual and visual to visual, are computed head by head from the queries
and keys of the layer, each head added to the sum of those before it: no (H, N, N) tensor is written.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecoderHeads:
    """Queries and keys of all tokens of a step in one layer, after RoPE.

    Attributes:
        query: (tokens, H, d), any floating dtype; under tensor parallelism the heads of this worker.
        key: (tokens, H', d), H a multiple of H'.
        scale: factor of the logits.
        num_heads: of the whole model.
        all_reduce: sums over the workers.
    """

    query: Tensor
    key: Tensor
    scale: float
    num_heads: int
    all_reduce: Callable[[Tensor], Tensor]

    def mean_attention(
        self, rows: Tensor, places: Tensor, context: Tensor, columns: Tensor, logits: bool = False
    ) -> Tensor:
        """Head-mean attention of some tokens to some others, out of the causal softmax over the whole prompt.

        Args:
            rows: (B, Q) int64, the tokens that attend.
            places: (B, Q) int64, their places in the prompt.
            context: (B, T) int64, the tokens of the prompt in order, filled up behind with any.
            columns: (B, N) int64, places of the tokens that are attended to.
            logits: give the scaled products before mask and softmax instead.

        Returns:
            (B, Q, N) fp32.

        Source: arXiv:2411.17686, Sec. 2.3.
        """
        B, Q = rows.shape
        N, T = columns.shape[1], context.shape[1]
        columns = columns[:, None].expand(B, Q, N)
        future = torch.arange(T, device=rows.device) > places[..., None]
        total = torch.zeros((B, Q, N), dtype=torch.float32, device=rows.device)
        group = self.query.shape[1] // self.key.shape[1]
        for head in range(self.query.shape[1]):
            query, key = self.query[rows, head].float(), self.key[context, head // group].float()
            products = torch.bmm(query, key.transpose(1, 2)).mul_(self.scale)
            if not logits:
                products = products.masked_fill_(future, -torch.inf).softmax(dim=-1)
            total += products.gather(2, columns)
        return self.all_reduce(total).div_(self.num_heads)

    def mean_key(self, rows: Tensor) -> Tensor:
        """Head-mean keys, every key head counted once for each of its query heads.

        Args:
            rows: (B, N) int64.

        Returns:
            (B, N, d) fp32.
        """
        group = self.query.shape[1] // self.key.shape[1]
        return self.all_reduce(self.key[rows].float().sum(dim=2) * group).div_(self.num_heads)
