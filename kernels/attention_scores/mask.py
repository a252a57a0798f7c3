"""Which keys a query may look at."""

from typing import NamedTuple

from torch import Tensor


class Mask(NamedTuple):
    """Which keys a query may look at, and how much each key counts. The default hides nothing.

    Attributes:
        bias: (B, N) any floating dtype, added to the scaled logits of each key; -inf hides it.
        causal: whether query i sees only the keys j <= i + offset.
        offset: (B,) int32 or int64, how far each item's queries stand behind its keys; None means 0.
        query_length: (B,) int32 or int64, how many queries of each item count; None means all.
        key_length: (B,) int32 or int64, how many keys of each item count; None means all.
    """

    bias: Tensor | None = None
    causal: bool = False
    offset: Tensor | None = None
    query_length: Tensor | None = None
    key_length: Tensor | None = None
