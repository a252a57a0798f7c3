"""Token reduction in pure torch: filter, correlate, compress (arXiv:2411.17686).

    from ficoco_vllm.reduction import Signals, available, get, reduce

    signals = Signals(visual_attention=..., cls_attention=..., position=..., grid=(24, 24))
    tokens, size, position = reduce("ficoco-v", tokens, signals, num_removed=43, lam=0.35)

To call the same method often, fix its settings once: `reducer = get("ficoco-v").configure(lam=0.35)`.
"""

from operator import index
from typing import Any

from torch import Tensor

from ficoco_vllm.reduction.method import Method, Reduced, Reducer
from ficoco_vllm.reduction.observation import Observation, Observer
from ficoco_vllm.reduction.registry import available, get
from ficoco_vllm.reduction.signals import Partition, Signals, partition
from ficoco_vllm.reduction.stage import Compression, Correlation, Filter


def reduce(
    method: str | Method,
    tokens: Tensor,
    signals: Signals,
    num_removed: int,
    size: Tensor | None = None,
    **settings: Any,
) -> Reduced:
    """Remove `num_removed` visual tokens, and merge their information into the rest if the method merges.

    Args:
        method: a name from `available()`, or a method.
        tokens: (B, N, D), any floating dtype.
        signals: signals of this layer, N tokens.
        num_removed: R, an integer of Python, NumPy or a tensor. Zero is the identity.
        size: (B, N), number of original patches that each token represents; None means one each.
        **settings: settings of the method; the others keep their defaults.

    Returns:
        N - R tokens in their order, followed by the fused ones that the method appends (`num_extra`).

    Raises:
        ValueError: unknown method or setting, a missing signal, a shape or dtype that does not fit, or R out of range.

    Source: arXiv:2411.17686, Alg. 1 and 2.
    """
    chosen = get(method) if isinstance(method, str) else method
    for name, value in (("tokens", tokens), ("size", size)):
        if not isinstance(value, Tensor) and (name == "tokens" or value is not None):
            raise ValueError(f"{name} is of type {type(value).__name__}; allowed: a tensor")
    try:
        num_removed = index(num_removed)
    except TypeError as error:
        raise ValueError(f"num_removed = {num_removed!r} is not allowed; allowed: an integer") from error
    size = None if size is None else size.float()
    return chosen.configure(**settings)(tokens, signals, num_removed, size)


__all__ = [
    "Compression",
    "Correlation",
    "Filter",
    "Method",
    "Observation",
    "Observer",
    "Partition",
    "Reduced",
    "Reducer",
    "Signals",
    "available",
    "get",
    "partition",
    "reduce",
]
