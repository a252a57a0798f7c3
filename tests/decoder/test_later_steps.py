"""Places, slots and lengths of all segments at once, against a plain loop over requests and segments."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ficoco_vllm.decoder.later_steps import LaterSteps
from ficoco_vllm.planning.decoder import RequestPlan

SEGMENTS, REQUESTS, BLOCK, BLOCKS = 3, 6, 16, 10
# Tokens of an image of 64 in each segment.
COUNTS = (64, 40, 8)


def plan(start: int) -> RequestPlan:
    """A prompt with one image."""
    return RequestPlan("fastv", start + 80, ((start, 64),), tuple((count,) for count in COUNTS))


def batch(numbers: list[int], computed: list[int], scheduled: list[int]) -> Any:
    """The part of vLLM's batch that is read, of requests in this order."""
    starts = np.cumsum([0, *scheduled]).astype(np.int32)
    lengths = np.array(computed) + scheduled
    places = [torch.arange(before, before + count) for before, count in zip(computed, scheduled, strict=True)]
    return SimpleNamespace(
        num_reqs=len(numbers),
        num_tokens=sum(scheduled),
        idx_mapping=torch.tensor(numbers),
        idx_mapping_np=np.array(numbers),
        num_computed_tokens_np=np.array(computed, dtype=np.int32),
        num_scheduled_tokens=np.array(scheduled),
        seq_lens=torch.from_numpy(lengths.astype(np.int32)),
        seq_lens_cpu_upper_bound=torch.from_numpy(lengths.astype(np.int32)),
        positions=torch.cat(places),
        query_start_loc=torch.from_numpy(starts),
        query_start_loc_np=starts,
        max_query_len=None,
    )


@pytest.mark.parametrize("scheduled", [[1, 1, 1, 1], [1, 5, 1, 17]], ids=["decoding", "text"])
def test_rows_of_every_segment(scheduled: list[int]) -> None:
    steps = LaterSteps(torch.full((SEGMENTS, REQUESTS), 99, dtype=torch.int32), 64)
    plans = {4: plan(10), 0: plan(3), 5: plan(20)}
    for number, one in plans.items():
        steps.add_request(number, one)
    steps.copy_to_device()
    numbers, computed = [4, 2, 0, 5], [90, 7, 100, 84]  # the second one has no image
    step = batch(numbers, computed, scheduled)
    assert steps.include(step)
    tables = tuple(torch.randint(0, 50, (len(numbers), BLOCKS), dtype=torch.int32) for _ in range(SEGMENTS))
    slots = torch.full((SEGMENTS, 30), -1)
    result = steps.rows(step, len(numbers) + 1, step.num_tokens, tables, BLOCK, slots)
    assert len(result) == SEGMENTS
    for segment, rows in enumerate(result):
        dropped = [64 - COUNTS[segment] if number in plans else 0 for number in numbers]
        lengths = [c + n - d for c, n, d in zip(computed, scheduled, dropped, strict=True)]
        assert rows.seq_lens.tolist() == [*lengths, 0] == rows.most_seq_lens.tolist()
        places = [
            place - missing
            for before, count, missing in zip(computed, scheduled, dropped, strict=True)
            for place in range(before, before + count)
        ]
        assert rows.places.tolist() == places
        owner = np.repeat(np.arange(len(numbers)), scheduled)
        expected = [
            int(tables[segment][request, place // BLOCK]) * BLOCK + place % BLOCK
            for request, place in zip(owner, places, strict=True)
        ]
        assert rows.slots[segment].tolist() == expected + [-1] * (30 - len(expected))
        assert (rows.num_tokens, rows.most) == (step.num_tokens, max(scheduled))
    # In memory that CUDA graphs know.
    assert result[1].seq_lens.data_ptr() == steps.seq_lens[1].data_ptr()


def test_steps_with_an_image_to_compute_are_others() -> None:
    steps = LaterSteps(torch.zeros(SEGMENTS, REQUESTS, dtype=torch.int32), 64)
    steps.add_request(1, plan(10))
    assert steps.include(batch([1], [74], [1]))
    assert not steps.include(batch([0, 1], [5, 73], [1, 1]))
    steps.remove_request(1)
    assert steps.include(batch([1], [0], [1]))


def test_a_request_in_the_place_of_another() -> None:
    """One that is not reduced, or one of a dummy step, for which nothing is copied."""
    steps = LaterSteps(torch.zeros(SEGMENTS, REQUESTS, dtype=torch.int32), 64)
    steps.add_request(1, plan(10))
    steps.copy_to_device()
    steps.remove_request(1)
    slots = torch.arange(SEGMENTS).repeat(4, 1).T.contiguous()
    before = slots.clone()
    tables = tuple(torch.zeros(1, BLOCKS, dtype=torch.int32) for _ in range(SEGMENTS))
    for rows in steps.rows(batch([1], [40], [1]), 1, 1, tables, BLOCK, slots):
        assert rows.seq_lens.tolist() == [41]
    assert torch.equal(slots, before)
