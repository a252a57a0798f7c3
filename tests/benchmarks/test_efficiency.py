"""`make bench-efficiency` in miniature, on the demo model; and models of LLaVA-1.5's shapes without engines."""

import json
import random
from pathlib import Path

import pytest

from ficoco_vllm.benchmarks.efficiency.__main__ import bars, measure
from ficoco_vllm.benchmarks.efficiency.tables import TABLES, markdown
from ficoco_vllm.benchmarks.harness import model
from ficoco_vllm.benchmarks.harness.model import WHOLE_MODELS
from ficoco_vllm.benchmarks.ttft.kinds import KINDS, predicted_speedup
from ficoco_vllm.reduction.cost import Device, model_shape

TABLE_8, TABLE_9 = TABLES
# Its arithmetic is the only limit, so that predictions are ratios of FLOPs.
ARITHMETIC = Device("made up", 1e9, 1e30, 1e12, 0.0, "made up")


@pytest.mark.long
@pytest.mark.engine
def test_every_row_multiplies_and_holds_what_is_planned(demo_model: Path) -> None:
    shape = model_shape(json.loads((demo_model / "config.json").read_text()))
    rows = measure(str(demo_model), TABLE_8, "fp16", shape, 1, random.Random(0))
    assert [row["method"] for row in rows] == ["LLaVA-1.5", "FiCoCo-V", "FiCoCo-L", "FiCoCo-VL"]
    assert all(bar.passed for bar in bars(rows)), rows
    # An engine that silently does not reduce would have the counts of the first row.
    stock, reduced, *_ = rows
    lied = [stock, reduced | {key: stock[key] for key in ("flops", "kv_bytes")}]
    assert not any(bar.passed for bar in bars(lied))
    first, *others = markdown(TABLE_8, rows)[2:6]
    assert f"| {stock['flops'] / 1e12:.2f} | {stock['kv_bytes'] / 1e6:.1f} |" in first
    assert all("| measured |" in line for line in others)


def test_what_was_not_measured_is_marked_as_planned() -> None:
    lines = markdown(TABLE_9, [])[2:]
    assert len(lines) == 12
    assert all("| planned |" in line for line in lines)
    assert (
        "| FiCoCo-L | L: 576 in layers 1-4, 25 after | INT8 | W8A8, 8 bits | planned | 15.10 | 242.5 |"
        in lines[6]
    )


def test_the_rows_are_the_papers() -> None:
    """Its printed KV cache fixes the mean number of tokens in a layer, where the method can be served like that."""
    shape = model_shape(model.config(40, "13b"))
    printed = {"LLaVA-1.5": 891, "FiCoCo-V": 488, "FiCoCo-L": 485, "FiCoCo-VL": 482}
    for row in TABLE_9.rows:
        tokens = sum(512 + count for count in row.plan(shape).decoder[:-1])
        assert tokens * 2 * shape.decoder.kv_width * 2 / 1e6 == pytest.approx(printed[row.method], abs=0.5)


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
    """The tower, most of which is not reduced, has a smaller share."""
    small, large = (predicted_speedup(KINDS["keep-64"], 4, ARITHMETIC, size) for size in ("7b", "13b"))
    assert 2 < small < large
