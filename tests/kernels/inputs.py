"""Inputs of the attention ops, and how far single precision may be from the truth."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ficoco_vllm.kernels.attention_scores import reference
from tests.kernels.conftest import DEVICE


@dataclass(frozen=True)
class Case:
    """Queries and keys of one test.

    Attributes:
        B: items.
        H: query heads.
        Hk: key heads.
        M: queries.
        N: keys.
        d: head size.
        dtype: of queries and keys.
        strided: whether they are views of one projection, tokens before heads.
        spread: how large the entries are.
    """

    B: int = 2
    H: int = 2
    Hk: int = 2
    M: int = 37
    N: int = 37
    d: int = 32
    dtype: torch.dtype = torch.float32
    strided: bool = False
    spread: float = 1.0

    @property
    def scale(self) -> float:
        """Scale of the logits."""
        return self.d**-0.5

    def heads(self) -> tuple[Tensor, Tensor]:
        """Queries (B, H, M, d) and keys (B, Hk, N, d)."""
        generator = torch.Generator().manual_seed(self.M * 1000 + self.N + self.d)
        if self.strided:
            # One projection has as many keys as queries: Hk and N are H and M.
            qkv = torch.randn((self.B, self.M, 3, self.H, self.d), generator=generator) * self.spread
            query, key, _ = qkv.to(self.dtype).permute(2, 0, 3, 1, 4).unbind(0)
            return query, key
        query = torch.randn((self.B, self.H, self.M, self.d), generator=generator) * self.spread
        key = torch.randn((self.B, self.Hk, self.N, self.d), generator=generator) * self.spread
        return query.to(self.dtype), key.to(self.dtype)


def tolerance(query: Tensor, key: Tensor, scale: float, **mask: Any) -> float:
    """Absolute tolerance of an attention weight or a normaliser.

    A logit of size L carries a rounding error of about L * 2^-23 per step of its dot product; the
    exponential turns it into the same relative error of a weight, which is at most 1. Eight steps' worth:
    errors of a sum of d products grow as sqrt(d), and d is at most 128.
    """
    logits = reference.logits(query, key, scale, **mask)
    finite = logits[logits.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return 8 * 2**-23 * (4.0 + largest)


def on_device(mask: dict[str, Any]) -> dict[str, Any]:
    """The same mask where the kernels run."""
    return {name: part.to(DEVICE) if isinstance(part, Tensor) else part for name, part in mask.items()}


def biased(B: int, N: int) -> Tensor:
    """A bias (B, N) that hides every fifth key."""
    bias = torch.linspace(-2, 2, B * N).reshape(B, N)
    bias[:, ::5] = -torch.inf
    return bias


CASES = [
    Case(),
    Case(M=1, N=1),
    Case(M=63, N=63, d=64, strided=True, dtype=torch.float16),
    Case(M=16, N=130, Hk=1, H=3, d=40),
    Case(M=65, N=33, d=128, dtype=torch.bfloat16),
    Case(B=1, H=1, Hk=1, M=577, N=577, d=64, strided=True, dtype=torch.float16),
    Case(M=70, N=70, d=72, H=4, Hk=2, dtype=torch.bfloat16),
    Case(spread=12.0),
    replace(Case(spread=6.0), dtype=torch.float16),
    Case(spread=0.0),
]
