"""What a reducing step asks of the device at each boundary: few launches, staged copies, and never an answer."""

from collections import Counter
from typing import Any

import pytest
import torch

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.decoder import reduction
from ficoco_vllm.decoder.attention import DecoderHeads
from ficoco_vllm.decoder.boundary import Part, boundary
from ficoco_vllm.decoder.reduction import Rows, reduce_rows
from ficoco_vllm.planning.decoder import DecoderPlanner
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


class Staged:
    """Stand-in for `to_device` that counts its calls and returns an empty tensor of the same shape and type."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, values: Any, device: torch.device) -> torch.Tensor:
        self.count += 1
        return torch.empty(values.shape, dtype=torch.from_numpy(values).dtype, device=device)


def work(method: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], DeviceWork, int]:
    """Launches of one reduction, what torch launches of them, and staged copies."""
    launched, staged = record_launches(monkeypatch), Staged()
    for module in (staging, reduction):
        monkeypatch.setattr(module, "to_device", staged)
    lengths, images = (N + 60, N + 40), ((4, N), (2, N))
    total = sum(lengths)
    config = FicocoConfig.parse({"method": method, "keep": 64, "num_segments": 4, "backend": "triton"})
    planner = DecoderPlanner.shared(config, 32, N)
    plans = [planner.plan(length, [image], None) for length, image in zip(lengths, images, strict=True)]
    parts = [Part(plan, 0, plan.num_prompt_tokens) for plan in plans]
    segment = planner.reducing_segments(method)[0]
    where = boundary([0, lengths[0], total], parts, segment, lambda name: False)
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
