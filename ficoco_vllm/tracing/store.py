"""Traces in the worker: recorded while a request is reduced, kept until the server fetches them."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ficoco_vllm.reduction import Observation, Observer

# Traces that a worker holds, about 1 MB each for LLaVA-1.5; new ones evict those that are never fetched.
MAX_TRACES = 16

# Site, layer, and number of the tile in its image: 0 for a whole image.
_Place = tuple[str, int, int]


@dataclass(frozen=True)
class LayerTrace:
    """One reduction of one image, on the device where it took place.

    Attributes:
        source: (R,) int64 indices into the N tokens that came in, of those that left.
        target: (K,) int64 indices of those that stayed.
        share: (R, K + E) fp32 part of each source that each outgoing token took.
        size: (K + E,) fp32 patches that each outgoing token represents.
        position: (K + E,) int64 index of each outgoing token in the grid, -1 for a fused one.
    """

    source: Tensor
    target: Tensor
    share: Tensor
    size: Tensor
    position: Tensor

    @classmethod
    def of(cls, seen: Observation, index: int) -> "LayerTrace":
        """One image of an observed batch."""
        return cls(
            source=seen.partition.source[index],
            target=seen.partition.target[index],
            share=seen.shares(index),
            size=seen.new_size[index],
            position=seen.position[index],
        )

    def wire(self) -> dict[str, Any]:
        """Plain lists; of the shares only those that are not zero, as rows, columns and values."""
        share = self.share.cpu()
        rows, columns = share.nonzero(as_tuple=True)
        return {
            "source": self.source.tolist(),
            "target": self.target.tolist(),
            "rows": rows.tolist(),
            "columns": columns.tolist(),
            "values": share[rows, columns].tolist(),
            "size": self.size.tolist(),
            "position": self.position.tolist(),
        }


class Traces:
    """The latest traces of one worker. Nothing is read back from the device until a trace is fetched."""

    def __init__(self, max_traces: int = MAX_TRACES) -> None:
        """Start empty.

        Args:
            max_traces: number that is held.
        """
        self.max_traces = max_traces
        self._layers: OrderedDict[int, dict[_Place, LayerTrace]] = OrderedDict()

    def observer(
        self, site: str, layer: int, traced: Mapping[int, int], tiles: Mapping[int, int] | None = None
    ) -> Observer | None:
        """The observer that records a reduction.

        Args:
            site: "encoder", "features" or "decoder".
            layer: index.
            traced: index in the batch to trace id, for the images, or tiles, that are traced.
            tiles: index in the batch to number of the tile in its image; None for whole images.

        Returns:
            The observer for the reducer; None where nothing is traced.
        """
        if not traced:
            return None

        def record(seen: Observation) -> None:
            for index, trace_id in traced.items():
                # A preempted request is reduced again, with the same result.
                tile = 0 if tiles is None else tiles[index]
                self._open(trace_id)[site, layer, tile] = LayerTrace.of(seen, index)

        return record

    def take(self, trace_id: int) -> list[dict[str, Any]]:
        """Return a trace and forget it.

        Args:
            trace_id: trace id of the request.

        Returns:
            Its reductions, each with `site`, `layer` and `tile`; empty where nothing was recorded.
        """
        layers = self._layers.pop(trace_id, {})
        return [
            {"site": site, "layer": layer, "tile": tile, **trace.wire()}
            for (site, layer, tile), trace in layers.items()
        ]

    def _open(self, trace_id: int) -> dict[_Place, LayerTrace]:
        layers = self._layers.setdefault(trace_id, {})
        self._layers.move_to_end(trace_id)
        while len(self._layers) > self.max_traces:
            self._layers.popitem(last=False)
        return layers
