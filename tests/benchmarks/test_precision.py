"""`make bench-precision` in miniature, and its bars on figures that are made up."""

import copy
from typing import Any

import pytest
import torch

from ficoco_vllm.benchmarks.precision import measure
from ficoco_vllm.benchmarks.precision.__main__ import MOST_DIFFERING, MOST_TIMES, _pictures, bars
from ficoco_vllm.planning.families import tower_shape


def good() -> dict[str, Any]:
    """A result that holds every bar."""
    row = {"mean": 0.01, "most": 0.1, "changed": 0.0}
    variant = {name: dict(row) for name in ("bfloat16", "float16", "fp8-kv")}
    return {
        "kept": {
            "demo": {"ficoco-v": {"bfloat16": {"share": [0.01, MOST_DIFFERING], "feature_error": [0.01]}}}
        },
        "log_probabilities": {"none": variant, "ficoco-v": copy.deepcopy(variant)},
    }


def test_bars() -> None:
    assert all(bar.passed for bar in bars(good()))
    assert len(list(bars(good()))) == 4
    worse = good()
    worse["kept"]["demo"]["ficoco-v"]["bfloat16"]["share"][-1] = MOST_DIFFERING + 0.01
    worse["log_probabilities"]["ficoco-v"]["fp8-kv"]["mean"] = 0.0101 * MOST_TIMES
    assert {bar.name for bar in bars(worse) if not bar.passed} == {
        "precision-kept-ficoco-v-bfloat16",
        "precision-logprob-ficoco-v-fp8-kv",
    }


def test_kept_tokens_of_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 has eight times the digits of bfloat16, and float64 is the same as itself."""
    demo = measure.demo()
    images, shape = _pictures(2, 0), tower_shape(demo.config)
    rows = measure.differing(demo.model.vision_tower, shape, images, "ficoco-v", 64)
    assert len(rows["bfloat16"]["share"]) == len(rows["float16"]["share"]) == 4
    assert 0 < rows["bfloat16"]["share"][-1] < MOST_DIFFERING
    assert rows["float16"]["share"][-1] < rows["bfloat16"]["share"][-1]
    assert 1e-4 < rows["float16"]["feature_error"][0] < rows["bfloat16"]["feature_error"][0] / 2
    monkeypatch.setattr(measure, "PRECISIONS", {"same": torch.float64})
    same = measure.differing(demo.model.vision_tower, shape, images[:1], "ficoco-v", 64)
    assert same == {"same": {"share": [0.0] * 4, "feature_error": [0.0]}}


def test_an_fp8_cache_rounds_what_attention_reads() -> None:
    from transformers import DynamicCache

    keys = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    with measure.fp8_cache():
        given, _ = DynamicCache().update(keys, keys, 0)
    assert torch.equal(given, keys.float().to(measure.FP8).double())
    given, _ = DynamicCache().update(keys, keys, 0)
    assert torch.equal(given, keys)
