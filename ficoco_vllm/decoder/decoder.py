"""vLLM's language model, run segment by segment in the steps that reduce a prompt."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context

from ficoco_vllm.decoder.adapters import StepAdapters
from ficoco_vllm.decoder.attention import DecoderHeads
from ficoco_vllm.decoder.boundary import Boundary, ImageGroup
from ficoco_vllm.decoder.cached_keys import cached_keys
from ficoco_vllm.decoder.layers import LAYER_KINDS
from ficoco_vllm.decoder.reduction import Rows, reduce_rows
from ficoco_vllm.decoder.segment import Segment, Unit, compile_unit
from ficoco_vllm.metrics.stopwatch import Stopwatch
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.reduction import Observer
from ficoco_vllm.tracing.store import Traces


@dataclass(frozen=True)
class ReducingStep:
    """Indices of a step in which prompts are reduced.

    Attributes:
        boundaries: boundary after each segment except the last.
        slot_mapping: attention layer to the KV slot of each of its rows, for the layers with fewer rows than
            tokens.
        traced: first row of an image in the first segment to the trace that it goes into.
        cached_slots: for each segment, KV slots of the tokens before the windows that earlier steps have computed, of
            all requests that are reduced; None without any.
    """

    boundaries: tuple[Boundary, ...]
    slot_mapping: dict[str, Tensor]
    traced: dict[int, int]
    cached_slots: tuple[Tensor | None, ...]

    @property
    def method(self) -> str:
        """Name of the method that reduces in this step, "mixed" for several."""
        names = {group.method for boundary in self.boundaries for group in boundary.groups}
        return names.pop() if len(names) == 1 else "mixed"


class SegmentedDecoder:
    """View of vLLM's decoder, cut into segments. It owns no weights."""

    def __init__(
        self,
        decoder: Any,
        planner: DecoderPlanner,
        grid: tuple[int, int],
        compiled: bool = False,
        stopwatch: Stopwatch | None = None,
        traces: Traces | None = None,
    ) -> None:
        """Cut a decoder into segments.

        Args:
            decoder: vLLM's model of a type in `LAYER_KINDS`, whole on this worker.
            planner: planner of the served model.
            grid: rows and columns of an unreduced image.
            compiled: whether each segment is compiled, as one unit.
            stopwatch: takes the time of the reductions.
            traces: store of the requested traces.
        """
        self.planner = planner
        self.stopwatch = stopwatch
        self.grid = grid
        self.traces = Traces() if traces is None else traces
        layers, size = list(decoder.layers), planner.segments.size
        self.segments = [
            Segment(
                before=layers[start - 1] if start else None,
                layers=layers[start : start + size],
                norm=decoder.norm if start + size == len(layers) else None,
                kind=LAYER_KINDS[decoder.config.model_type],
            )
            for start in range(0, len(layers), size)
        ]
        self.units: list[Unit] = [
            compile_unit(segment, index) if compiled else segment
            for index, segment in enumerate(self.segments)
        ]
        self.num_heads: int = decoder.config.num_attention_heads

    def __call__(
        self, positions: Tensor, hidden: Tensor, step: ReducingStep, deepstack: Sequence[Tensor] = ()
    ) -> Tensor:
        """Run a step that reduces.

        Args:
            positions: (tokens,) int64; (3, tokens) for M-RoPE.
            hidden: (tokens, D) embeddings.
            step: where the tokens lie.
            deepstack: (tokens, D) features to add to the outputs of the first layers, one for each.

        Returns:
            (tokens, D) hidden states. Rows of tokens that have left are zero and must not be read.

        Source: arXiv:2411.17686, Alg. 2.
        """
        get_forward_context().slot_mapping.update(step.slot_mapping)
        num_tokens = hidden.shape[0]
        origin = torch.arange(num_tokens, device=hidden.device)
        rows = Rows(hidden, origin, torch.ones(num_tokens, dtype=torch.float32, device=hidden.device))
        lap = None if self.stopwatch is None else self.stopwatch.lap(step.method, hidden.device)
        adapters = StepAdapters.of(self.segments[0].last.self_attn)
        for index, (segment, unit) in enumerate(zip(self.segments, self.units, strict=True)):
            if adapters is not None and index:
                adapters.assign(rows.origin)
            # No token leaves before the last of these features is added; see `DecoderPlanner.first_layer`.
            added = self._added(deepstack, index)
            output, query, key = unit(positions[..., rows.origin], rows.hidden, added)
            rows = Rows(output, rows.origin, rows.size)
            if index < len(step.boundaries) and step.boundaries[index].groups:
                heads = self._heads(segment, query, key, step.cached_slots[index])
                layer = (index + 1) * self.planner.segments.size - 1
                observer_of = partial(self._observer, layer, step.traced) if step.traced else None
                boundary = step.boundaries[index]
                with nullcontext() if lap is None else lap.running():
                    rows = reduce_rows(rows, heads, boundary, self.planner, self.grid, observer_of)
        if adapters is not None:
            adapters.assign(origin)  # as the rest of vLLM's step expects it
        if self.stopwatch is not None and lap is not None:
            self.stopwatch.hand_in(lap)
        result = torch.zeros_like(hidden)
        result[rows.origin] = rows.hidden
        return result

    def warm_up(self, positions: Tensor, hidden: Tensor, deepstack: Sequence[Tensor] = ()) -> None:
        """Compile the segments and allocate the memory of a reducing step, while vLLM profiles memory.

        Args:
            positions: (tokens,) int64; (3, tokens) for M-RoPE.
            hidden: (tokens, D) embeddings.
            deepstack: see `__call__`.
        """
        hidden = hidden.clone()  # vLLM uses it afterwards, and fused norms write into their inputs
        for index, unit in enumerate(self.units):
            hidden, _, _ = unit(positions, hidden, self._added(deepstack, index))

    def _added(self, deepstack: Sequence[Tensor], segment: int) -> Sequence[Tensor]:
        """Features that a segment adds, after the MLP of the layer before it and those of its layers but the last."""
        size = self.planner.segments.size
        return deepstack[max(segment * size - 1, 0) : (segment + 1) * size - 1]

    def _observer(self, layer: int, traced: dict[int, int], group: ImageGroup) -> Observer | None:
        in_group = {index: traced[row] for index, row in enumerate(group.first_row) if row in traced}
        return self.traces.observer("decoder", layer, in_group)

    def _heads(
        self, segment: Segment, query: Tensor, key: Tensor, cached_slots: Tensor | None
    ) -> DecoderHeads:
        attention = segment.last.self_attn
        parallel = get_tensor_model_parallel_world_size() > 1
        return DecoderHeads(
            query=query.view(query.shape[0], -1, attention.head_dim),
            key=key.view(key.shape[0], -1, attention.head_dim),
            scale=attention.scaling,
            num_heads=self.num_heads,
            all_reduce=tensor_model_parallel_all_reduce if parallel else None,
            backend=self.planner.config.backend,
            cached_key=None
            if cached_slots is None
            else cached_keys(attention.attn, cached_slots).to(key.dtype),
        )
