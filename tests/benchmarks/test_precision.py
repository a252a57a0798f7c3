"""`make bench-precision` in miniature, and its bars on figures that are made up."""

import copy
from typing import Any

import pytest
import torch

from ficoco_vllm.benchmarks.precision import measure
from ficoco_vllm.benchmarks.precision.__main__ import MOST_DIFFERING, MOST_TIMES, _pictures, bars, ratios
from ficoco_vllm.planning.families import tower_shape

# Mean error of a log-probability without a reduction.
MEANS = {"bfloat16": 0.02, "float16": 0.0025, "fp8-kv": 0.01}


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


def test_errors_are_compared_with_bfloat16_and_with_the_same_precision() -> None:
    """The bar is of bfloat16's error; that of the precision itself is reported."""
    row = good()["log_probabilities"]["none"]
    result = good()
    result["log_probabilities"]["none"] = {name: row[name] | {"mean": mean} for name, mean in MEANS.items()}
    found = ratios(result["log_probabilities"])
    assert found == {
        "ficoco-v": {
            "bfloat16": {"over_bfloat16": 0.5, "over_own": 0.5},
            "float16": {"over_bfloat16": 0.5, "over_own": 4.0},
            "fp8-kv": {"over_bfloat16": 0.5, "over_own": 1.0},
        }
    }
    assert all(bar.passed for bar in bars(result))


def test_each_precision_has_the_models_own_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary frequencies are in float32, as loading leaves them, whatever was measured before."""
    seen: dict[torch.dtype, torch.Tensor] = {}

    def answers(model: Any, *_: Any) -> torch.Tensor:
        frequencies = model.model.language_model.rotary_emb.inv_freq
        assert frequencies.dtype == torch.float32
        seen[model.dtype] = frequencies
        return torch.zeros(1, 2, dtype=torch.float64)

    monkeypatch.setattr(measure, "_answers", answers)
    measure.log_probabilities(1)
    assert set(seen) == {torch.float64, torch.bfloat16, torch.float16}
    assert all(torch.equal(one, seen[torch.float64]) for one in seen.values())


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
