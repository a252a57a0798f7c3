"""The roofline against figures worked out by hand, and against what it must do at its ends."""

from dataclasses import replace
from pathlib import Path

import pytest

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.reduction.cost import (
    DEVICES,
    KNOWN_MODELS,
    Device,
    TokenPlan,
    estimate,
    model_shape,
    predict,
    reached,
    unreduced,
)

SHAPE = model_shape(KNOWN_MODELS["llava-hf/llava-1.5-7b-hf"])
# A device whose arithmetic, or memory, or launches alone take time.
ARITHMETIC = Device("arithmetic", 1e12, 1e30, 80e9, 0.0, "made up")
MEMORY = Device("memory", 1e30, 1e12, 80e9, 0.0, "made up")
LAUNCHES = Device("launches", 1e30, 1e30, 80e9, 1e-6, "made up")


def plan(keep: int | None, method: str = "ficoco-v") -> TokenPlan:
    """Tokens of one image, layer by layer; `keep` None keeps all."""
    if keep is None:
        return unreduced(SHAPE)
    return ServerPlan.for_model(FicocoConfig(method=method, keep=keep), SHAPE).image_tokens()


@pytest.mark.parametrize("tokens", [plan(None), plan(64), plan(64, "ficoco-l"), plan(64, "ficoco-vl")])
def test_arithmetic_alone_is_the_count_of_flops(tokens: TokenPlan) -> None:
    """All but the patch embedding and the reduction, which are left out."""
    times = predict(SHAPE, tokens, ARITHMETIC, num_text_tokens=60)
    cost = estimate(SHAPE, tokens, num_text_tokens=60)
    assert times.prefill_seconds == pytest.approx(cost.decoder_flops / 1e12, rel=1e-9)
    assert times.tower_seconds == pytest.approx((cost.tower_flops + cost.projector_flops) / 1e12, rel=5e-3)


def test_memory_alone_is_the_weights() -> None:
    """A token reads 32 layers of 202,375,168 parameters, the head, and the prompt's keys and values, 2 bytes each."""
    times = predict(SHAPE, plan(64), MEMORY, num_text_tokens=60)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064
    cache = 124 * 32 * 2 * 4096
    assert times.decode_seconds == pytest.approx(2 * (weights + cache) / 1e12, rel=1e-9)
    assert times.prefill_seconds > 2 * weights / 1e12


def test_launches_alone() -> None:
    """23 layers of the tower, twelve of which reduce; 32 of the decoder."""
    times = predict(SHAPE, plan(64), LAUNCHES, num_text_tokens=60)
    assert times.tower_seconds == pytest.approx((23 * 12 + 12 * 8) * 1e-6)
    assert times.prefill_seconds == pytest.approx(32 * 10 * 1e-6)
    assert predict(SHAPE, plan(None), LAUNCHES, num_text_tokens=60).tower_seconds == pytest.approx(23 * 12e-6)


def test_concurrency_is_that_of_the_kv_cache() -> None:
    device = DEVICES["l40s"]
    weights = estimate(SHAPE, plan(None), num_text_tokens=60).weight_bytes
    for tokens, num_tokens in ((plan(None), 636), (plan(64), 124)):
        times = predict(SHAPE, tokens, device, num_text_tokens=60, num_output_tokens=100)
        request_bytes = (num_tokens + 100) * 32 * 2 * 4096 * 2
        assert times.num_concurrent == min(256, (0.9 * 48e9 - weights) // request_bytes)


def test_a_model_that_does_not_fit_serves_nobody() -> None:
    times = predict(SHAPE, plan(64), replace(DEVICES["h100"], memory_bytes=12e9), num_text_tokens=60)
    assert times.num_concurrent == 0
    assert times.requests_per_second == 0


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_fewer_tokens_serve_more_but_at_most_by_their_flops(name: str) -> None:
    """One request alone gains less than its FLOPs say: weights are read in any case."""
    device = reached(DEVICES[name])
    stock, reduced = (predict(SHAPE, tokens, device, num_text_tokens=60) for tokens in (plan(None), plan(64)))
    costs = [estimate(SHAPE, tokens, num_text_tokens=60).total_flops for tokens in (plan(None), plan(64))]
    assert 1 < stock.ttft_seconds / reduced.ttft_seconds < costs[0] / costs[1]
    assert reduced.requests_per_second > stock.requests_per_second
    assert reduced.num_concurrent >= stock.num_concurrent


def test_several_images_and_a_batch() -> None:
    """Two images take the tower at most twice as long, and at least as long as one."""
    one, two = (
        predict(SHAPE, plan(64), reached(DEVICES["h100"]), num_text_tokens=60, num_images=number)
        for number in (1, 2)
    )
    assert one.tower_seconds <= two.tower_seconds <= 2 * one.tower_seconds


def test_the_page_on_gpus_prints_these_times() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    for name in DEVICES:
        stock, reduced = (
            predict(SHAPE, tokens, reached(DEVICES[name]), num_text_tokens=60)
            for tokens in (plan(None), plan(64))
        )
        cells = (
            f"{1e3 * stock.ttft_seconds:.1f} ms, {1e3 * reduced.ttft_seconds:.1f} ms",
            f"{stock.requests_per_second:.0f}, {reduced.requests_per_second:.0f}",
            f"{stock.num_concurrent}, {reduced.num_concurrent}",
        )
        assert f"| {name} | {' | '.join(cells)} |" in page
