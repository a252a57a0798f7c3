"""The decoder's layers in segments of equal size; tokens may leave in the last layer of all but the final segment."""

from collections.abc import Sequence
from dataclasses import dataclass

# Defaults of methods are written for LLaVA-1.5-7B's decoder.
REFERENCE_LAYERS = 32
DEFAULT_SEGMENTS = 8
# More segments are tried only where they let a method reduce exactly in the layers that it names.
MOST_SEGMENTS = 16


@dataclass(frozen=True)
class Segments:
    """Decoder layers 0 to L - 1 in S runs of L / S layers; each run is one group of vLLM's KV cache.

    The runs are equally long because the groups of vLLM's cache share one pool of blocks, and a block holds the
    same number of layers in every group.

    Attributes:
        num_layers: L.
        num_segments: S, a divisor of L.
    """

    num_layers: int
    num_segments: int

    def __post_init__(self) -> None:
        if self.num_segments < 1 or self.num_layers % self.num_segments:
            allowed = ", ".join(str(count) for count in _divisors(self.num_layers))
            raise ValueError(
                f"num_segments = {self.num_segments} does not divide the {self.num_layers} layers of the decoder; "
                f"allowed: {allowed}"
            )

    @property
    def size(self) -> int:
        """Layers of one segment."""
        return self.num_layers // self.num_segments

    def of_layer(self, layer: int) -> int:
        """The segment that a layer belongs to."""
        return layer // self.size

    def end(self, segment: int) -> int:
        """The last layer of a segment, in which tokens leave after its attention."""
        return (segment + 1) * self.size - 1

    def reducing(self, first_layer: int = 0) -> tuple[int, ...]:
        """The segments in whose last layer tokens may leave, ascending: all but the final one.

        Args:
            first_layer: the first layer of the decoder in which tokens may leave.
        """
        return tuple(segment for segment in range(self.num_segments - 1) if self.end(segment) >= first_layer)

    def nearest(self, layer: int, first_layer: int = 0) -> int:
        """The reducing segment whose last layer is nearest to a layer (the earlier of two).

        Args:
            layer: index.
            first_layer: see `reducing`, which must not be empty.
        """
        return min(self.reducing(first_layer), key=lambda segment: (abs(self.end(segment) - layer), segment))

    @classmethod
    def choose(cls, num_layers: int, layers: Sequence[int]) -> "Segments":
        """Segments for a method.

        Args:
            num_layers: number of layers of the decoder.
            layers: in which the method reduces.

        Returns:
            About `DEFAULT_SEGMENTS`; more, up to `MOST_SEGMENTS`, if it takes more for one to end in each of `layers`.
        """
        divisors = _divisors(num_layers)
        usual = max(count for count in divisors if count <= DEFAULT_SEGMENTS)
        for count in divisors:
            segments = cls(num_layers, count)
            exact = all((layer + 1) % segments.size == 0 for layer in layers)
            if usual <= count <= MOST_SEGMENTS and exact:
                return segments
        return cls(num_layers, usual)


def scaled(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Layers that are named for a decoder of 32, rescaled if they do not fit another depth.

    Args:
        layers: counted from 0; tokens leave in them, so the last layer of the decoder does not fit.
        num_layers: number of layers of the decoder.
    """
    if max(layers) < num_layers - 1:
        return tuple(layers)
    return tuple(layer * num_layers // REFERENCE_LAYERS for layer in layers)


def _divisors(number: int) -> list[int]:
    return [count for count in range(1, number + 1) if number % count == 0]
