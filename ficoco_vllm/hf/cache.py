"""State of a reduction, stored on a KV cache."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor


class ShortenedCache:
    """Mixin for a cache of transformers whose layers hold fewer tokens than its caller has passed.

    Attributes:
        ficoco: the tokens in it.
    """

    ficoco: "CacheState"
    layers: list[Any]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the caller, by which `generate` cuts a longer chat."""
        return self.ficoco.num_seen - self.ficoco.num_cropped(self)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Tokens that a layer holds, after which attention masks begin."""
        return int(self.layers[layer_idx].get_seq_length())


@dataclass
class CacheState:
    """The tokens in a shortened cache.

    Attributes:
        first_layers: the first layer of each segment.
        held: for each segment, (B, length) bool, false for padding.
        next_position: (B, 1) int64, position of the next token.
        num_seen: tokens of the caller that have been computed.
    """

    first_layers: tuple[int, ...]
    held: list[Tensor]
    next_position: Tensor
    num_seen: int

    @classmethod
    def of(cls, cache: Any) -> "CacheState | None":
        """The state of a cache that was filled under a reduction, updated for any crop since then."""
        if not isinstance(cache, ShortenedCache):
            return None
        state = cache.ficoco
        cropped = state.num_cropped(cache)
        if cropped:
            state.held = [mask[:, : mask.shape[1] - cropped] for mask in state.held]
            state.next_position = state.next_position - cropped
            state.num_seen -= cropped
        return state

    @classmethod
    def begin(cls, cache: Any, first_layers: tuple[int, ...], mask: Tensor) -> "CacheState":
        """The state of a cache that was filled without a reduction, or not at all.

        Args:
            cache: cache of transformers, or None. Its class becomes a `ShortenedCache`.
            first_layers: first layer of each segment.
            mask: (B, tokens in the cache) bool, false for padding.
        """
        state = cls(first_layers, [mask] * len(first_layers), mask.sum(dim=1, keepdim=True), mask.shape[1])
        if cache is not None:
            # `generate` keeps a reference to the cache that it created, so its class is changed in place.
            kind: Any = type(cache)
            cache.__class__ = _shortened(kind)
            cache.ficoco = state
        return state

    def advance(self, held: list[Tensor], num_tokens: Tensor, num_seen: int) -> None:
        """Record computed tokens.

        Args:
            held: see the attribute.
            num_tokens: (B, 1) int64 tokens of each prompt, before any reduction in the decoder.
            num_seen: tokens of the caller.
        """
        self.held = held
        self.next_position = self.next_position + num_tokens
        self.num_seen += num_seen

    def num_cropped(self, cache: Any) -> int:
        """Number of tokens, always generated ones, that assisted generation has removed."""
        return self.held[0].shape[1] - int(cache.layers[0].get_seq_length()) if cache.layers else 0


@cache
def _shortened(kind: Any) -> type:
    return type(f"Shortened{kind.__name__}", (ShortenedCache, kind), {})
