"""Device work of a step: a bounded number of launches, staged copies, no synchronisation."""

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.decoder import decoder, later_steps, reduction, state
from ficoco_vllm.decoder.attention import DecoderHeads
from ficoco_vllm.decoder.boundary import Part, boundary
from ficoco_vllm.decoder.decoder import SegmentedDecoder
from ficoco_vllm.decoder.later_steps import LaterSteps
from ficoco_vllm.decoder.reduction import Rows, reduce_rows
from ficoco_vllm.decoder.state import DecoderModelState
from ficoco_vllm.planning.decoder import DecoderPlanner, RequestPlan
from ficoco_vllm.reduction import available
from ficoco_vllm.vision import staging
from tests.kernels.conftest import INTERPRETED
from tests.support.device_work import DeviceWork, record_launches

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the launcher"),
]

WIDTH, H, d, N = 64, 4, 32, 576
# Launches of one boundary, two prompts of different length as one group. TOPS picks 192 tokens one after another.
BUDGET = {
    "fastv": 24,
    "ficoco-l": 30,
    "fitprune": 34,
    "pyramiddrop": 24,
    "sparsevlm": 120,
    "tops-l": 48 + 22 * 192,
    "vscan-l": 24,
}
# Indices of a boundary that are copied to the device.
COPIES = 3
# Launches that prepare a decoding step, for any number of requests: lengths; then places and blocks of all rows, and
# their slots in each segment.
LENGTHS, PLACES, TAKE = 3, 5, 1
# Launches that prepare a step with images, and more for each segment that does not hold all tokens.
WITH_IMAGES, SLOTS = 11, 4
# Launches of the decoder in a reducing step: to index rows at its start and end, and positions for each segment.
ENDS, POSITIONS = 4, 1
SEGMENTS, BLOCK = 4, 16
META = torch.device("meta")
LENGTHS_OF_PROMPTS = (N + 60, N + 40)


class Staged:
    """Stand-in for `to_device` that counts its calls and returns an empty tensor of the same shape and type."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, values: Any, device: torch.device) -> torch.Tensor:
        self.count += 1
        return torch.empty(values.shape, dtype=torch.from_numpy(values).dtype, device=device)


def stage(monkeypatch: pytest.MonkeyPatch) -> Staged:
    """Count staged copies instead of making them."""
    staged = Staged()
    for module in (staging, reduction, later_steps):
        monkeypatch.setattr(module, "to_device", staged)
    return staged


def planned(method: str) -> tuple[DecoderPlanner, list[RequestPlan]]:
    """The planner of a server, and the plans of two prompts of different length."""
    settings = {"method": method, "keep": 64, "num_segments": SEGMENTS, "backend": "triton"}
    planner = DecoderPlanner.shared(FicocoConfig.parse(settings), 32, N)
    images = ((4, N), (2, N))
    return planner, [
        planner.plan(length, [image], None) for length, image in zip(LENGTHS_OF_PROMPTS, images, strict=True)
    ]


def work(method: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], DeviceWork, int]:
    """Launches of one reduction, what torch launches of them, and staged copies."""
    launched, staged = record_launches(monkeypatch), stage(monkeypatch)
    planner, plans = planned(method)
    parts = [Part(plan, 0, plan.num_prompt_tokens) for plan in plans]
    segment = planner.reducing_segments(method)[0]
    total = sum(LENGTHS_OF_PROMPTS)
    where = boundary([0, LENGTHS_OF_PROMPTS[0], total], parts, segment, lambda name: False)
    hidden = torch.empty(total, WIDTH, dtype=torch.bfloat16, device="meta")
    query = torch.empty(total, H, d, dtype=torch.bfloat16, device="meta")
    heads = DecoderHeads(query, query, d**-0.5, H, None, planner.config.backend)
    rows = Rows(
        hidden, torch.empty(total, dtype=torch.int64, device="meta"), torch.empty(total, device="meta")
    )
    with torch.inference_mode(), DeviceWork() as done:
        after = reduce_rows(rows, heads, where, planner, (24, 24))
    assert after.hidden.shape[0] < total
    return launched, done, staged.count


@pytest.mark.parametrize("method", sorted(BUDGET))
def test_launches_of_a_boundary(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, done, copies = work(method, monkeypatch)
    launches = launched + done.launches
    assert launched["partition_kernel"] == 1, "the fused ops run"
    assert launches.total() <= BUDGET[method], (launches.total(), launches)
    assert copies <= COPIES, copies
    assert not done.copies, "a copy that is not staged waits for the device"


def test_every_served_method_has_a_budget() -> None:
    assert set(BUDGET) == set(available("decoder"))


def test_a_copy_that_is_not_staged_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the copies as they would be without staging."""
    monkeypatch.setattr(Staged, "__call__", lambda self, values, device: torch.from_numpy(values).to(device))
    _, done, _ = work("ficoco-l", monkeypatch)
    assert done.copies


class Step:
    """A server with two prompts, on the device meta, without an engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, images: bool = True) -> None:
        self.planner, plans = planned("ficoco-l")
        seq_lens = torch.zeros((SEGMENTS, 8), dtype=torch.int32, device=META)
        self.state = DecoderModelState.__new__(DecoderModelState)
        self.state.__dict__.update(
            device=META,
            planner=self.planner,
            plans=dict(zip("ab", plans, strict=True)) if images else {},
            traced={},
            max_model_len=2048,
            block_sizes=[BLOCK] * SEGMENTS,
            seq_lens=seq_lens,
            later_steps=LaterSteps(seq_lens, 2048),
        )
        for number, plan in enumerate(plans if images else []):
            self.state.later_steps.add_request(number, plan)
        self.metadata: list[dict[str, Any]] = []
        # What vLLM's backends do with it is the same in stock vLLM.
        monkeypatch.setattr(state, "build_attn_metadata", self._note)
        self.groups = [[SimpleNamespace(layer_names=[str(segment)])] for segment in range(SEGMENTS)]
        self.launched, self.staged = record_launches(monkeypatch), stage(monkeypatch)
        self.done = DeviceWork()

    def _note(self, **given: Any) -> dict[str, Any]:
        self.metadata.append(given)
        return {}

    def prepare(self, computed: Sequence[int], scheduled: Sequence[int], padded: int = 2) -> None:
        """`prepare_attn` of a step with both requests, decoding ones filled up to a graph's."""
        starts = np.zeros(padded + 1, dtype=np.int32)
        starts[1:] = sum(scheduled)
        starts[1:3] = np.cumsum(scheduled)
        lengths = np.zeros(padded, dtype=np.int32)
        lengths[:2] = np.add(computed, scheduled)
        total = sum(scheduled)
        batch = SimpleNamespace(
            req_ids=["a", "b"],
            num_reqs=2,
            num_reqs_after_padding=padded,
            num_tokens=total,
            num_tokens_after_padding=total + padded - 2,
            idx_mapping=torch.empty(2, dtype=torch.int64, device=META),
            idx_mapping_np=np.arange(2),
            num_computed_tokens_np=np.array(computed, dtype=np.int32),
            num_scheduled_tokens=np.array(scheduled),
            seq_lens=torch.empty(padded, dtype=torch.int32, device=META),
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
            positions=torch.empty(total + padded - 2, dtype=torch.int64, device=META),
            query_start_loc=torch.empty(padded + 1, dtype=torch.int32, device=META),
            query_start_loc_np=starts,
            is_prefilling_np=np.zeros(2, dtype=bool),
            max_query_len=None,
        )
        tables = tuple(torch.empty((padded, 128), dtype=torch.int32, device=META) for _ in range(SEGMENTS))
        slots = torch.empty((SEGMENTS, 2048), dtype=torch.int64, device=META)
        mode = CUDAGraphMode.FULL if padded > 2 else CUDAGraphMode.NONE
        with torch.inference_mode(), self.done:
            self.state.prepare_attn(
                batch, mode, tables, slots[:, : total + padded - 2], self.groups, kv_cache_config=None
            )
        assert not self.done.copies, "a copy that is not staged waits for the device"

    def run(self, monkeypatch: pytest.MonkeyPatch) -> Tensor:
        """The decoder of a step that reduces; its layers cost nothing."""
        monkeypatch.setattr(decoder, "get_forward_context", lambda: SimpleNamespace(slot_mapping={}))
        monkeypatch.setattr(decoder, "get_tensor_model_parallel_world_size", lambda: 1)
        attention = SimpleNamespace(qkv_proj=None, head_dim=d, scaling=d**-0.5, attn=None)
        segment = SimpleNamespace(last=SimpleNamespace(self_attn=attention))
        view = SegmentedDecoder.__new__(SegmentedDecoder)

        def unit(positions: Tensor, hidden: Tensor, added: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            heads = hidden.new_empty((len(hidden), H * d))
            return hidden, heads, heads

        view.__dict__.update(
            planner=self.planner,
            stopwatch=None,
            grid=(24, 24),
            traces=None,
            segments=[segment] * SEGMENTS,
            units=[unit] * SEGMENTS,
            num_heads=H,
        )
        total = sum(LENGTHS_OF_PROMPTS)
        hidden = torch.empty((total, WIDTH), dtype=torch.bfloat16, device=META)
        positions = torch.empty(total, dtype=torch.int64, device=META)
        assert self.state.step is not None
        with torch.inference_mode(), self.done:
            return view(positions, hidden, self.state.step)

    def launches(self) -> Counter[str]:
        """All that has been launched."""
        return self.done.launches + self.launched


@pytest.mark.parametrize("images", [True, False])
def test_launches_of_a_decoding_step(images: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied; without images there is nothing to rewrite."""
    step = Step(monkeypatch, images)
    step.prepare((N + 60, N + 41), (1, 1), padded=4)
    launches = step.launches()
    assert launches.total() <= LENGTHS + images * (PLACES + TAKE * SEGMENTS), launches
    assert step.staged.count == 0
    assert [len(given["seq_lens"]) for given in step.metadata] == [4] * SEGMENTS


def test_launches_of_a_reducing_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy brings all that the host has computed; boundaries add their own launches and copies."""
    step = Step(monkeypatch)
    step.prepare((0, 0), LENGTHS_OF_PROMPTS)
    prepared = step.launches()
    assert prepared.total() <= WITH_IMAGES + SLOTS * (SEGMENTS - 1), prepared
    assert step.staged.count == 1
    step.run(monkeypatch)
    boundaries = len(step.planner.reducing_segments("ficoco-l"))
    launches = step.launches() - prepared
    assert launches["partition_kernel"] == boundaries > 0
    assert launches.total() <= ENDS + POSITIONS * SEGMENTS + boundaries * BUDGET["ficoco-l"], launches
    assert step.staged.count <= 1 + boundaries * COPIES
    assert not step.done.copies
