"""Schedules: number of tokens that each reducing layer removes. Host-side integers only."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise

from ficoco_vllm.reduction.stage import all_but_one

KINDS = ("even", "one-shot", "geometric")
# The paper's first reducing decoder layer, the "4-th layer of the LLM" (arXiv:2411.17686, Sec. 10), counted from 0.
DECODER_START_LAYER = 3


def default_start_layer(num_layers: int) -> int:
    """The paper's first reducing encoder layer, the 12th of 24, in an encoder of another depth.

    floor(11/24 of the depth): 24 -> 11, 12 -> 5, 8 -> 3, 4 -> 1, counted from 0. A LLaVA reads the hidden
    state before the last layer, so of 24 layers the first 23 run and those at 11 to 22 reduce: 12 reductions.

    Args:
        num_layers: depth of the whole encoder, including layers after the feature layer.

    Raises:
        ValueError: fewer than one layer.

    Source: arXiv:2411.17686, Sec. 10.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers = {num_layers}: an encoder has at least 1 layer")
    return num_layers * 11 // 24


def shallow_layer(num_layers: int) -> int:
    """VScan's shallow layer, the 6th of 24, in an encoder of another depth: 24 -> 5, 8 -> 1, 4 -> 0, counted from 0.

    Args:
        num_layers: depth of the whole encoder, including layers after the feature layer.

    Source: arXiv:2505.22654, Sec. 4.
    """
    return num_layers * 5 // 24


def make_schedule(
    kind: str | Sequence[int],
    num_tokens: int,
    keep: int,
    layers: Sequence[int],
    num_extra: int = 0,
    max_removed: Callable[[int], int] = all_but_one,
) -> dict[int, int]:
    """Number of tokens that leave at each layer, so that exactly `keep` remain.

    A layer that removes r > 0 tokens also appends E fused ones, which later layers count like any other.

    Args:
        kind: "even" spreads the loss over the layers, remainder first (512 over 12 layers: 8 x 43, then 4 x
            42); "one-shot" takes all at the first layer; "geometric" shrinks by the same ratio at each
            layer (PyramidDrop); or the counts r themselves, one a layer.
        num_tokens: N, before the first layer.
        keep: tokens after the last layer, fused ones included.
        layers: indices of the reducing layers, ascending.
        num_extra: E of the method.
        max_removed: the most tokens that one call of the method may remove, as a function of their number.

    Returns:
        Layer index to r, for every layer given.

    Raises:
        ValueError: the schedule cannot be kept, with the layer and the numbers.

    Source: arXiv:2411.17686, Sec. 10; arXiv:2410.17247 (geometric).
    """
    if not 1 <= keep <= num_tokens:
        raise ValueError(f"keep = {keep}: allowed is 1 to {num_tokens}, the number of visual tokens")
    if not layers and keep < num_tokens:
        raise ValueError(f"keep = {keep} of {num_tokens} tokens needs at least one reducing layer")
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"layers = {list(layers)}: must ascend, none twice")
    if isinstance(kind, str):
        losses = _losses(kind, num_tokens, keep, len(layers), lambda left: max_removed(left) - num_extra)
        removed = [loss + num_extra if loss else 0 for loss in losses]
    else:
        removed = list(kind)
        if len(removed) != len(layers):
            raise ValueError(f"schedule = {removed}: {len(layers)} reducing layers need as many counts")
    left = num_tokens
    for layer, count in zip(layers, removed, strict=True):
        most = max_removed(left)
        if not 0 <= count <= most:
            raise ValueError(
                f"schedule {kind!r} removes {count} of {left} tokens at layer {layer}, "
                f"where 0 to {most} are possible"
            )
        left += num_extra - count if count else 0
    if left != keep:
        raise ValueError(f"schedule = {removed} keeps {left} tokens, not keep = {keep}")
    return dict(zip(layers, removed, strict=True))


def _losses(
    kind: str, num_tokens: int, keep: int, num_layers: int, most: Callable[[int], int]
) -> Sequence[int]:
    """Net loss of tokens at each layer; `most` returns the largest possible one."""
    total = num_tokens - keep
    if kind == "even":
        return _even(num_tokens, keep, num_layers, most)
    if kind == "one-shot":
        return [total if index == 0 else 0 for index in range(num_layers)]
    if kind == "geometric":
        ratio = keep / num_tokens
        counts = [round(num_tokens * ratio ** (step / num_layers)) for step in range(num_layers)] + [keep]
        return [before - after for before, after in pairwise(counts)]
    raise ValueError(f"schedule = {kind!r}: allowed are {', '.join(KINDS)}, or one count a layer")


def _even(num_tokens: int, keep: int, num_layers: int, most: Callable[[int], int]) -> Sequence[int]:
    """Equal losses at every layer, the remainder first; more at earlier layers if later ones cannot lose as much.

    The fewer tokens are left, the fewer can leave, so an even split may exceed `most` at a layer. The ceilings are then
    an even split of a larger total, the least one that reaches `keep`. Losses never grow from layer to layer.

    Raises:
        ValueError: no schedule reaches `keep`.
    """

    def under(ceilings: int) -> Sequence[int]:
        """The largest possible losses below an even split of `ceilings`."""
        each, rest = divmod(ceilings, max(num_layers, 1))
        left, losses = num_tokens, []
        for index in range(num_layers):
            losses.append(max(0, min(each + (index < rest), most(left), left - keep)))
            left -= losses[-1]
        return losses

    total, unlimited = num_tokens - keep, num_tokens * num_layers
    fewest = num_tokens - sum(under(unlimited))
    if fewest > keep:
        layers = "1 reducing layer" if num_layers == 1 else f"{num_layers} reducing layers"
        raise ValueError(
            f"keep = {keep}: {layers} can reach {fewest} of {num_tokens} at least, "
            f"as the first of them can lose no more than {max(most(num_tokens), 0)}"
        )
    return under(bisect_left(range(unlimited), total, lo=total, key=lambda ceilings: sum(under(ceilings))))
