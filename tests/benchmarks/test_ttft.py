"""`make bench-ttft` without an engine: the models that it writes, their plans, and the bars of the roofline."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ficoco_vllm.benchmarks.harness import device
from ficoco_vllm.benchmarks.ttft.__main__ import LIMITS, bars, summarise
from ficoco_vllm.benchmarks.ttft.kinds import kinds, predicted_speedup, predicted_ttft, token_plan
from ficoco_vllm.benchmarks.ttft.models import MODELS, NUM_TEXT_TOKENS, write
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.configurations import hf_config_of
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.reduction.cost import Device

DEVICE = Device("made up", 1e11, 2e10, 24e9, 0.0, "made up")
NEW = ("internvl3-8b", "qwen3-vl-8b")


@pytest.mark.parametrize("size", NEW)
def test_a_model_is_written_whose_processor_counts_as_planned(size: str, tmp_path: Path) -> None:
    """Transformers reads configuration and processor; the prompt has the planned number of visual tokens."""
    from PIL import Image
    from transformers import AutoConfig, AutoProcessor

    model = MODELS[size]
    write(tmp_path, 4, size)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.text_config.num_hidden_layers == 4
    assert model.num_layers > 4
    processor = AutoProcessor.from_pretrained(tmp_path)
    image = Image.new("RGB", (model.side, model.side))
    result = processor(images=[image], text="".join(model.image) + "a", return_tensors="pt")
    (tokens,) = result["input_ids"].tolist()
    num_visual = tokens.count(config.image_token_id)
    assert num_visual == model.keeps[0] == token_plan(kinds(size)["stock"], 4, size).decoder[0]
    assert len(tokens) - num_visual - 1 == model.num_around


@pytest.mark.parametrize("size", NEW)
def test_a_plan_has_the_tokens_of_the_written_model(size: str, tmp_path: Path) -> None:
    """Its image processor has settings of its own, which the engine's plans follow."""
    write(tmp_path, 8, size)
    config = json.loads((tmp_path / "config.json").read_text())
    images = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    for kind in kinds(size).values():
        settings = {**(kind.settings or {"method": "ficoco-v"}), "keep": kind.keep}
        served = ServerPlan.of(FicocoConfig.model_validate(settings), hf_config_of(config, images))
        pixels = None if served.tower.shape.tiling is None else (MODELS[size].side,) * 2
        plan = served.image_tokens(size=pixels) if kind.settings else served.unreduced(pixels)
        assert token_plan(kind, 8, size) == plan


def test_counts_are_not_rounded_to_blocks() -> None:
    """Predictions are of the plan, from which a prefix cache deviates."""
    assert LIMITS["enable_prefix_caching"] is False


@pytest.mark.parametrize("size", list(MODELS))
def test_plans_and_predictions_of_every_row(size: str) -> None:
    for name, kind in kinds(size).items():
        plan = token_plan(kind, 8, size)
        # A smaller image has whole rows and columns of patches.
        assert plan.decoder[-1] == (25 if name == "downscale" else kind.keep)
        assert plan.decoder[0] == (kind.keep if name.startswith("keep") else plan.decoder[0])
        assert predicted_ttft(kind, 8, DEVICE, size) > 0
    smallest = MODELS[size].keeps[-1]
    assert 1 / 9.5 < smallest / MODELS[size].keeps[0] < 1 / 8.5
    gain = predicted_speedup(kinds(size)[f"keep-{smallest}"], MODELS[size].num_layers, DEVICE, size)
    assert 1 < gain < 9


def samples(size: str, slower: float) -> dict[str, list[dict[str, float]]]:
    """Requests that take the predicted time, multiplied."""
    order = random.Random(0)
    measured = {}
    for name, kind in kinds(size).items():
        plan = token_plan(kind, 8, size)
        times = [predicted_ttft(kind, 8, DEVICE, size) * slower * order.uniform(0.99, 1.01) for _ in range(3)]
        prompt = NUM_TEXT_TOKENS + MODELS[size].num_around + plan.decoder[0]
        rest = {"tower_seconds": 1.0, "reduction_seconds": 0.01}
        measured[name] = [{"ttft_seconds": time, "num_prompt_tokens": prompt, **rest} for time in times]
    return measured


@pytest.mark.parametrize(
    ("slower", "failing"), [(1.3, set()), (2.5, {""}), (0.8, {"-at-most"})], ids=["near", "far", "below"]
)
@pytest.mark.parametrize("size", ["7b", *NEW])
def test_the_roofline_is_held_against_the_measured_times(size: str, slower: float, failing: set[str]) -> None:
    """It may be neither above the measured times, as it is a lower bound, nor far below."""
    rows = summarise(8, samples(size, slower), DEVICE, size)
    for row in rows.values():
        assert row["roofline_share"] == pytest.approx(1 / slower, rel=0.02)
    smallest = f"keep-{MODELS[size].keeps[-1]}"
    whole: dict[str, Any] = {smallest: {"speedup": 2.0, "predicted_speedup": 2.0}}
    result = {"model_size": size, "runs": [{"layers": 8, "kinds": rows}], "whole_model": whole}
    failed = {bar.name for bar in bars(result) if not bar.passed}
    assert failed == {f"ttft-roofline-of-measured-8-layers{end}" for end in failing}


@pytest.mark.parametrize(
    ("dtype", "num_products", "fastest"), [(torch.float32, 2, 0.5), (torch.bfloat16, 1, 2.0)]
)
def test_the_ceiling_of_a_cpu_is_its_fastest_product(
    dtype: torch.dtype, num_products: int, fastest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of equal size are timed: torch's, and in float32 that of packed weights; then a copy."""
    seconds, shapes = iter([2.0, 0.5, 1.0]), list[torch.Size]()

    def took(call: Callable[[], Tensor]) -> float:
        shapes.append(call().shape)
        return next(seconds)

    monkeypatch.setattr(device, "_seconds", took)
    assert device.measure(dtype, "cpu").flops == 2 * 2048**3 / fastest
    assert shapes[:-1] == [torch.Size((2048, 2048))] * num_products
