"""What a reduction knows about a KV cache; it travels on the cache."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "ficoco"


@dataclass
class CacheState:
    """The tokens behind a cache whose layers hold fewer than the caller's mask counts.

    Attributes:
        layers: the first layer of each segment.
        held: of each segment, (B, length) bool, false for padding.
        next_position: (B, 1) int64, position of the next token.
        num_seen: tokens of the caller that have been computed.
    """

    layers: tuple[int, ...]
    held: list[Tensor] = field(default_factory=list)
    next_position: Tensor = field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.int64))
    num_seen: int = 0

    @classmethod
    def of(cls, cache: Any) -> "CacheState | None":
        """The state of a cache that was filled under a reduction, brought up to a crop that has happened since."""
        state: CacheState | None = getattr(cache, _ATTRIBUTE, None)
        if state is not None:
            state._follow_crop(cache)
        return state

    @classmethod
    def begin(cls, cache: Any, layers: tuple[int, ...], mask: Tensor) -> "CacheState":
        """The state of a cache that was filled without a reduction, or not at all.

        Args:
            cache: of transformers, or None.
            layers: the first layer of each segment.
            mask: (B, tokens in the cache) bool, false for padding.
        """
        state = cls(layers, [mask] * len(layers), mask.sum(dim=1, keepdim=True), mask.shape[1])
        if cache is not None:
            setattr(cache, _ATTRIBUTE, state)
        return state

    def advance(self, held: list[Tensor], num_tokens: Tensor, num_seen: int) -> None:
        """Note that tokens have been computed.

        Args:
            held: of each segment, as the attribute.
            num_tokens: (B, 1) int64 tokens that each prompt has got, before any reduction in the decoder.
            num_seen: tokens of the caller.
        """
        self.held = held
        self.next_position = self.next_position + num_tokens
        self.num_seen += num_seen

    def _follow_crop(self, cache: Any) -> None:
        """Assisted generation takes tokens back, always generated ones."""
        excess = self.held[0].shape[1] - cache.get_seq_length(self.layers[0])
        if excess > 0:
            lengths = [cache.get_seq_length(layer) for layer in self.layers]
            self.held = [mask[:, :length] for mask, length in zip(self.held, lengths, strict=True)]
            self.next_position = self.next_position - excess
            self.num_seen -= excess
