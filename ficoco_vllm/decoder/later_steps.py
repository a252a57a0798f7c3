"""Rows of a step in the segments, prepared on the device for all segments together; for steps without images."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ficoco_vllm.planning.decoder import RequestPlan
from ficoco_vllm.vision.staging import to_device


@dataclass(frozen=True)
class Rows:
    """Rows of a step in one segment.

    Attributes:
        query_start: first row of each request, on the device.
        query_start_cpu: the same on the host.
        num_tokens: rows.
        most: the most rows of a request.
        seq_lens: tokens of each request that the segment holds after the step.
        most_seq_lens: an upper bound of them, on the host.
        places: places of the rows in their sequences.
        slots: (groups, rows), of the rows in the KV cache.
    """

    query_start: Tensor
    query_start_cpu: Tensor
    num_tokens: int
    most: int
    seq_lens: Tensor
    most_seq_lens: Tensor
    places: Tensor
    slots: Tensor


class LaterSteps:
    """Steps whose requests have all of their images computed: the same rows in every segment.

    What a segment does not hold of a request is on the device since the request's first step, so the host copies
    nothing, and steps that only decode allocate nothing there.
    """

    def __init__(self, seq_lens: Tensor, max_num_tokens: int) -> None:
        """Allocate what steps need.

        Args:
            seq_lens: tokens of each request that a segment holds, (segments, requests); written.
            max_num_tokens: the most tokens that a step may have.
        """
        num_segments, num_reqs = seq_lens.shape
        self.seq_lens, self.device = seq_lens, seq_lens.device
        # By the number of a request in this worker: its prompt up to the last image, and tokens that leave it.
        self.last_image_end = np.zeros(num_reqs, dtype=np.int32)
        self.missing = np.zeros((num_segments, num_reqs), dtype=np.int32)
        self.missing_device = torch.zeros_like(seq_lens)
        # Room for the arithmetic of a step.
        size = num_segments * max_num_tokens
        self._missing = torch.empty(num_segments * num_reqs, dtype=torch.int32, device=self.device)
        self._places, self._block, self._offset = torch.empty(3, size, dtype=torch.int64, device=self.device)
        self._block_ids = torch.empty(size, dtype=torch.int32, device=self.device)
        self._request = torch.arange(num_reqs, device=self.device)

    def add_request(self, number: int, plan: RequestPlan) -> None:
        """Record the tokens that leave the prompt of a request."""
        self.last_image_end[number] = sum(plan.images[-1])
        self.missing[:, number] = plan.dropped

    def remove_request(self, number: int) -> None:
        """Forget a request."""
        self.last_image_end[number] = self.missing[:, number] = 0
        self.missing_device[:, number].zero_()  # dummy steps read it, too

    def copy_to_device(self) -> None:
        """Copy what new requests need there."""
        self.missing_device.copy_(to_device(self.missing, self.device))

    def include(self, input_batch: Any) -> bool:
        """Whether a step is one of these."""
        ends = self.last_image_end[input_batch.idx_mapping_np]
        return bool((input_batch.num_computed_tokens_np >= ends).all())

    def rows(
        self,
        input_batch: Any,
        padded_reqs: int,
        padded_tokens: int,
        block_tables: tuple[Tensor, ...],
        block_size: int,
        slot_mappings: Tensor,
    ) -> list[Rows]:
        """Rows of a step in each segment.

        Args:
            input_batch: batch of the step.
            padded_reqs: requests, with those that a CUDA graph adds.
            padded_tokens: its tokens, likewise padded.
            block_tables: block tables of each segment, (requests, blocks).
            block_size: tokens of one block.
            slot_mappings: (segments, tokens) of the unreduced step, rewritten.
        """
        num_reqs, num_segments = input_batch.num_reqs, len(self.missing)
        shape = (num_segments, num_reqs)
        missing_np = self.missing[:, input_batch.idx_mapping_np]
        missing = self._missing[: num_segments * num_reqs].view(shape)
        torch.index_select(self.missing_device, 1, input_batch.idx_mapping, out=missing)
        torch.sub(input_batch.seq_lens[:num_reqs], missing, out=self.seq_lens[:, :num_reqs])
        if padded_reqs > num_reqs:
            self.seq_lens[:, num_reqs:padded_reqs].zero_()
        most_seq_lens = np.zeros((num_segments, padded_reqs), dtype=np.int32)
        bound = input_batch.seq_lens_cpu_upper_bound.numpy()[:num_reqs]
        np.subtract(bound, missing_np, out=most_seq_lens[:, :num_reqs])
        places = input_batch.positions.expand(num_segments, -1)
        if missing_np.any():
            places = self._rewrite_slots(input_batch, missing, block_tables, block_size, slot_mappings)
        query_start = input_batch.query_start_loc[: padded_reqs + 1]
        query_start_cpu = torch.from_numpy(input_batch.query_start_loc_np[: padded_reqs + 1])
        most = input_batch.max_query_len or int(input_batch.num_scheduled_tokens.max())
        per_segment = zip(
            self.seq_lens[:, :padded_reqs].unbind(),
            torch.from_numpy(most_seq_lens).unbind(),
            places.unbind(),
            strict=True,
        )
        return [
            Rows(query_start, query_start_cpu, padded_tokens, most, seq_lens, bounds, place, slot_mappings)
            for seq_lens, bounds, place in per_segment
        ]

    def _rewrite_slots(
        self,
        input_batch: Any,
        missing: Tensor,
        block_tables: tuple[Tensor, ...],
        block_size: int,
        slot_mappings: Tensor,
    ) -> Tensor:
        """Move the rows of a step to their places in the KV cache of each segment.

        Args:
            input_batch: batch of the step.
            missing: tokens of each request without a slot, (segments, requests).
            block_tables: block tables of each segment, (requests, blocks).
            block_size: tokens of one block.
            slot_mappings: (segments, rows), of the unreduced step; rewritten.

        Returns:
            Place of each row in its sequence, (segments, rows).
        """
        num_reqs, num_tokens, num_segments = input_batch.num_reqs, input_batch.num_tokens, len(missing)
        request = self._request[:num_reqs]
        if num_tokens > num_reqs:
            rows = np.diff(input_batch.query_start_loc_np[: num_reqs + 1])
            request = to_device(np.repeat(np.arange(num_reqs), rows), self.device)
            missing = missing[:, request]
        shape = (num_segments, num_tokens)
        places, block, offset, block_ids = (
            room[: num_segments * num_tokens].view(shape)
            for room in (self._places, self._block, self._offset, self._block_ids)
        )
        torch.sub(input_batch.positions[:num_tokens], missing, out=places)
        torch.floor_divide(places, block_size, out=block)
        torch.remainder(places, block_size, out=offset)
        block.add_(request, alpha=block_tables[0].shape[1])
        for segment, table in enumerate(block_tables):
            torch.take(table, block[segment], out=block_ids[segment])
        torch.add(offset, block_ids, alpha=block_size, out=slot_mappings[:, :num_tokens])
        return places
