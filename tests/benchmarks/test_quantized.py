"""`make bench-quantized` and `make bench-ttft ARGS="--model-size 13b"`, without engines."""

import json
from pathlib import Path

import pytest

from benchmarks.quantized.__main__ import summary, table
from benchmarks.ttft import model
from benchmarks.ttft.kinds import KINDS, WHOLE_MODELS, predicted_speedup


def test_ratios_are_taken_round_by_round() -> None:
    samples = {
        ("plain", "keep-576"): [4.0, 8.0, 4.0],
        ("plain", "keep-64"): [2.0, 2.0, 2.0],
        ("int8", "keep-576"): [2.0, 4.0, 4.0],
        ("int8", "keep-64"): [1.0, 1.0, 0.5],
    }
    rows = summary(samples, ["plain", "int8"])
    assert [(row["weights"], row["kind"]) for row in rows] == list(samples)
    assert rows[1]["over_all_tokens"] == {"median": 2.0, "min": 2.0, "max": 4.0}
    assert rows[2]["over_first_weights"] == {"median": 2.0, "min": 1.0, "max": 2.0}
    predicted = {"keep-576": 1.0, "keep-64": 3.0, "ficoco-l": 1.5}
    pair = {("int8", "keep-576"): [3.0], ("int8", "ficoco-l"): [2.0]}
    told = table({"rows": rows + summary(pair, ["int8"])[1:], "predicted_speedup": predicted})
    assert (
        "| int8 | 64, FiCoCo-V | 1.00 (0.50-1.00) | 4.00x (2.00-8.00) | 3.00x | 2.00x (2.00-4.00) |" in told
    )
    # Beside its own weights only: against others nothing was measured.
    assert told.endswith("| int8 | 576 to 64, FiCoCo-L | 2.00 (2.00-2.00) | 1.50x (1.50-1.50) | 1.50x | - |")


@pytest.mark.parametrize(("size", "width", "heads", "layers"), [("7b", 4096, 32, 32), ("13b", 5120, 40, 40)])
def test_a_model_has_the_widths_of_its_size(
    tmp_path: Path, size: str, width: int, heads: int, layers: int
) -> None:
    model.write(tmp_path, 4, size, "int8")
    config = json.loads((tmp_path / "config.json").read_text())
    text = config["text_config"]
    assert (text["hidden_size"], text["num_attention_heads"], text["num_hidden_layers"]) == (width, heads, 4)
    assert config["quantization_config"]["format"] == "int-quantized"
    assert WHOLE_MODELS[size] == layers


def test_flops_say_more_of_a_wider_decoder() -> None:
    """The tower, which most of the reduction cannot touch, weighs less beside it."""
    small, large = (predicted_speedup(KINDS["keep-64"], 4, size) for size in ("7b", "13b"))
    assert 2 < small < large
