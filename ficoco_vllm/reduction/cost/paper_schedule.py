"""The paper's schedule, which reduces in every layer from a first one on. Only docs/paper-tables.md uses it.

The served decoder reduces at the ends of its segments: see `ficoco_vllm.planning`.
"""

from collections.abc import Sequence

from ficoco_vllm.reduction.cost.shapes import ModelShape
from ficoco_vllm.reduction.schedule import DECODER_START_LAYER, default_start_layer, make_schedule


def tower_tokens(shape: ModelShape, keep: int) -> tuple[int, ...]:
    """Patch tokens that enter each executed layer of the tower, and those that leave it: even from the 12th of 24 on.

    Args:
        shape: sizes of the model.
        keep: tokens that leave.

    Source: arXiv:2411.17686, Section 10.
    """
    num_layers = shape.tower.num_executed
    reducing = range(default_start_layer(shape.tower.num_layers), num_layers)
    return _counts("even", shape.tower.num_units, keep, num_layers, reducing)


def decoder_tokens(shape: ModelShape, entering: int, keep: int, schedule: str) -> tuple[int, ...]:
    """Visual tokens that enter each decoder layer, and those that leave it: reduced from the 4th layer on.

    Args:
        shape: sizes of the model.
        entering: visual tokens of an image that leave the tower.
        keep: tokens that leave.
        schedule: "even", "one-shot" or "geometric".

    Source: arXiv:2411.17686, Section 10.
    """
    num_layers = shape.decoder.num_layers
    return _counts(schedule, entering, keep, num_layers, range(DECODER_START_LAYER, num_layers))


def _counts(
    schedule: str, entering: int, keep: int, num_layers: int, reducing: Sequence[int]
) -> tuple[int, ...]:
    removed = make_schedule(schedule, entering, keep, reducing)
    counts = [entering]
    for layer in range(num_layers):
        counts.append(counts[-1] - removed.get(layer, 0))
    return tuple(counts)
