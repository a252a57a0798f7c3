"""Each step's sequence lengths, slots and attention metadata, segment by segment."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from ficoco_vllm.decoder.boundary import Part, boundary
from ficoco_vllm.decoder.decoder import ReducingStep
from ficoco_vllm.decoder.later_steps import LaterSteps, Rows
from ficoco_vllm.decoder.startup import replays_prefills
from ficoco_vllm.kv.admission import images_of
from ficoco_vllm.planning.decoder import RequestPlan
from ficoco_vllm.planning.server import decoder_planner
from ficoco_vllm.request_fields import TRACE
from ficoco_vllm.vision.staging import to_device_together

Counts = npt.NDArray[np.int32]


class DecoderModelState(DefaultModelState):
    """vLLM's model state, with the token counts of each segment instead of one for all layers.

    Decoding does not change the number of rows: slots are rewritten in place and sequence lengths live in persistent
    buffers, so that CUDA graphs captured for decoding stay valid. Only a step that prefills a reduced prompt has fewer
    rows from segment to segment; it passes a `ReducingStep` to the model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Other compiler settings can select this mode after the first check.
        if replays_prefills(self.vllm_config):
            raise ValueError("cudagraph_mode = 'FULL' is not allowed where the decoder reduces")
        self.planner = decoder_planner(self.vllm_config.model_config.hf_config)
        self.plans: dict[str, RequestPlan] = {}
        self.traced: dict[str, int] = {}  # request to trace id
        self.step: ReducingStep | None = None
        shape = (self.planner.segments.num_segments, self.max_num_reqs)
        self.seq_lens = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self.numbers: dict[str, int] = {}  # of requests in this worker
        self.later_steps = LaterSteps(self.seq_lens, self.max_num_tokens)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Plan a request; the scheduler computes the same plan."""
        super().add_request(req_index, new_req_data)
        req_id, params = new_req_data.req_id, new_req_data.sampling_params
        num_tokens = len(new_req_data.prompt_token_ids)
        plan = self.planner.plan(num_tokens, images_of(new_req_data), params.extra_args if params else None)
        if plan.reduces:
            self.plans[req_id] = plan
            self.numbers[req_id] = req_index
            self.later_steps.add_request(req_index, plan)
            if params and TRACE in (params.extra_args or {}):
                self.traced[req_id] = int(params.extra_args[TRACE])

    def apply_staged_writes(self) -> None:
        """Copy to the device what new requests need there."""
        super().apply_staged_writes()
        self.later_steps.copy_to_device()

    def remove_request(self, req_id: str) -> None:
        """Forget the plan of a request that has ended or was preempted."""
        super().remove_request(req_id)
        self.traced.pop(req_id, None)
        if self.plans.pop(req_id, None) is not None:
            self.later_steps.remove_request(self.numbers.pop(req_id))

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Pass the step of `prepare_attn` to the model."""
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        return inputs if self.step is None else {**inputs, "reduction": self.step}

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
        model_specific_attn_metadata: Any = None,
    ) -> dict[str, Any]:
        """Attention metadata of every layer; see vLLM's model state for the arguments.

        `slot_mappings` is rewritten in place where the number of rows does not change.
        """
        self.step = None
        full = cudagraph_mode == CUDAGraphMode.FULL
        padded_reqs = input_batch.num_reqs_after_padding if full else input_batch.num_reqs
        padded_tokens = input_batch.num_tokens_after_padding if full else input_batch.num_tokens
        if self.later_steps.include(input_batch):
            (block_size,) = set(self.block_sizes)
            segments = self.later_steps.rows(
                input_batch, padded_reqs, padded_tokens, block_tables, block_size, slot_mappings
            )
        else:
            segments = self._rows(
                input_batch, padded_reqs, padded_tokens, block_tables, slot_mappings, attn_groups
            )
        metadata: dict[str, Any] = {}
        only: list[list[Any]] = [[]] * len(attn_groups)
        is_prefilling = torch.from_numpy(input_batch.is_prefilling_np)
        for segment, rows in enumerate(segments):
            only[segment] = attn_groups[segment]
            metadata |= build_attn_metadata(
                attn_groups=only,
                num_reqs=padded_reqs,
                num_tokens=rows.num_tokens,
                query_start_loc_gpu=rows.query_start,
                query_start_loc_cpu=rows.query_start_cpu,
                max_query_len=rows.most,
                seq_lens=rows.seq_lens,
                max_seq_len=self.max_model_len if for_capture else int(rows.most_seq_lens.max()),
                block_tables=block_tables,
                slot_mappings=rows.slots,
                kv_cache_config=kv_cache_config,
                seq_lens_cpu_upper_bound=rows.most_seq_lens,
                positions=rows.places,
                is_prefilling=is_prefilling,
                for_cudagraph_capture=for_capture,
                ubatch_idx=ubatch_idx,
                model_specific_attn_metadata=model_specific_attn_metadata,
            )
            only[segment] = []
        return metadata

    def _rows(
        self,
        input_batch: Any,
        padded_reqs: int,
        padded_tokens: int,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[Any]],
    ) -> list[Rows]:
        """Rows of a step of which some are tokens of images, or come before them."""
        num_reqs, num_segments = input_batch.num_reqs, self.planner.segments.num_segments
        query_start_np = input_batch.query_start_loc_np[: num_reqs + 1]
        parts = self._parts(
            input_batch.req_ids[:num_reqs], input_batch.num_computed_tokens_np, query_start_np
        )
        # Tokens before and after the step that a segment does not hold.
        before, after = np.zeros((2, num_segments, num_reqs), dtype=np.int32)
        for index, part in enumerate(parts):
            if part is not None:
                before[:, index], after[:, index] = part.dropped_before, part.dropped
        missing = np.zeros((num_segments, padded_reqs), dtype=np.int32)
        missing[:, :num_reqs] = after
        rows = np.zeros((num_segments, padded_reqs), dtype=np.int32)
        rows[:, :num_reqs] = np.diff(query_start_np) - (after - before)
        starts = np.zeros((num_segments, padded_reqs + 1), dtype=np.int32)
        np.cumsum(rows, axis=1, out=starts[:, 1:])
        reducing = bool((before != after).any())
        # Rows of the segments that do not hold all tokens, and tokens of earlier steps that decisions read.
        moved = np.where(after.any(axis=1, keepdims=True), rows[:, :num_reqs], 0)
        cached = np.zeros_like(moved)
        if reducing:
            for index, part in enumerate(parts):
                if part is not None and part.windows:
                    cached[:, index] = part.start - before[:, index]
        arrays = [missing, starts, np.diff(query_start_np) + before, *_owners(moved), *_owners(cached)]
        sent = to_device_together(arrays, self.device)
        missing_device, starts_device, since, owner, within, cached_owner, cached_place = sent
        seq_lens = self.seq_lens[:, :padded_reqs]
        torch.sub(input_batch.seq_lens[:padded_reqs], missing_device, out=seq_lens).clamp_(min=0)
        bounds = input_batch.seq_lens_cpu_upper_bound[:padded_reqs] - torch.from_numpy(missing)
        # The host's count of computed tokens is an upper bound where drafts are refused; the device's is exact.
        held = input_batch.seq_lens[:num_reqs] - since
        places = within + held.flatten()[owner]
        places_of = places.split(moved.sum(axis=1).tolist())
        slots_of = self._slots(moved, owner, places, block_tables)
        result: list[Rows] = []
        shrunk: dict[str, Tensor] = {}
        for segment in range(num_segments):
            shrinks = bool((before[segment] != after[segment]).any())
            moves = bool(moved[segment].any())
            if moves and not shrinks:
                slot_mappings[segment, : len(slots_of[segment])] = slots_of[segment]
            if shrinks:
                shrunk |= {
                    name: slots_of[segment] for group in attn_groups[segment] for name in group.layer_names
                }
                row_count, most = int(starts[segment, -1]), int(rows[segment].max())
                query_start, query_start_cpu = starts_device[segment], torch.from_numpy(starts[segment])
            else:
                row_count = padded_tokens
                most = input_batch.max_query_len or int(rows[segment].max())
                query_start = input_batch.query_start_loc[: padded_reqs + 1]
                query_start_cpu = torch.from_numpy(input_batch.query_start_loc_np[: padded_reqs + 1])
            result.append(
                Rows(
                    query_start,
                    query_start_cpu,
                    row_count,
                    most,
                    seq_lens[segment],
                    bounds[segment],
                    places_of[segment] if moves else input_batch.positions,
                    slots_of[segment].expand(num_segments, -1) if shrinks else slot_mappings,
                )
            )
        if reducing:
            of_cached = self._slots(cached, cached_owner, cached_place, block_tables)
            cached_slots = tuple(slots if len(slots) else None for slots in of_cached)
            self.step = self._reducing_step(
                input_batch.req_ids, query_start_np.tolist(), parts, shrunk, cached_slots
            )
        return result

    def _parts(self, req_ids: Sequence[str], computed: Counts, query_start: Counts) -> list[Part | None]:
        """Tokens that a step computes of each request whose prompt is reduced, None for the others.

        The host may count refused drafts among the computed tokens; these come after the prompt, whose count is exact.
        """
        plans = [self.plans.get(req_id) for req_id in req_ids]
        ends = (computed[: len(plans)] + np.diff(query_start)).tolist()
        return [
            None if plan is None else Part(plan, start, end)
            for plan, start, end in zip(plans, computed.tolist(), ends, strict=False)
        ]

    def _slots(
        self, counts: Counts, owner: Tensor, places: Tensor, block_tables: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """KV slots of rows in each segment, (rows,) int64.

        Args:
            counts: rows of each request in each segment, (segments, requests).
            owner: owners of all these rows, see `_owners`.
            places: places of the rows in their sequences.
            block_tables: block tables of each segment, (requests, blocks).
        """
        (block_size,) = set(self.block_sizes)
        request, block, offset = owner % counts.shape[1], places // block_size, places % block_size
        ends = np.cumsum(counts.sum(axis=1)).tolist()
        result = []
        for table, start, end in zip(block_tables, [0, *ends], ends, strict=False):
            slots = offset[start:end]
            if start < end:
                slots = slots + table[request[start:end], block[start:end]].long() * block_size
            result.append(slots)
        return result

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Store the size of the blocks that the attention kernels use."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        segments = [group.kv_cache_spec.segment for group in kv_cache_config.kv_cache_groups]
        assert segments == list(range(self.planner.segments.num_segments)), (
            "one KV group for each segment, in order"
        )
        self.block_sizes = block_tables.block_sizes

    def _reducing_step(
        self,
        req_ids: Sequence[str],
        query_start: Sequence[int],
        parts: Sequence[Part | None],
        slots: dict[str, Tensor],
        cached_slots: tuple[Tensor | None, ...],
    ) -> ReducingStep:
        """Indices for the model, from the plans of the prompts that are reduced now."""
        boundaries = tuple(
            boundary(query_start, parts, segment, self._needs_equal_text)
            for segment in range(self.planner.segments.num_segments - 1)
        )
        traced = {
            start + part.plan.images[0][0] - part.start: self.traced[req_id]
            for req_id, start, part in zip(req_ids, query_start, parts, strict=False)
            if part is not None and part.windows and req_id in self.traced
        }
        return ReducingStep(boundaries, slots, traced, cached_slots)

    def _needs_equal_text(self, method: str) -> bool:
        return "text_features" in self.planner.reducer(method).signals


def _owners(counts: Counts) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Index of the count (by segment and request) of each row, and its place among the rows of that count."""
    flat = counts.ravel()
    owner = np.repeat(np.arange(counts.size), flat)
    return owner, np.arange(len(owner)) - (np.cumsum(flat) - flat)[owner]
