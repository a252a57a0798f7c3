"""Tables 8 and 9 in Markdown, as measured; rows that were not measured are marked as planned."""

from typing import Any

from ficoco_vllm.benchmarks.efficiency.rows import PRECISIONS, Row, Table, token_plan
from ficoco_vllm.benchmarks.harness import model
from ficoco_vllm.benchmarks.harness.model import WHOLE_MODELS
from ficoco_vllm.benchmarks.harness.pages import table as markdown_table
from ficoco_vllm.benchmarks.harness.rounds import ranged
from ficoco_vllm.reduction.cost import estimate, model_shape

WEIGHTS = {"plain": "bfloat16", "int8": "W8A8", "int4": "W4A16"}
HEAD = (
    *("Method", "Schedule", "Row", "Weights, KV cache", "Figures", "TFLOPs", "KV MB, in blocks"),
    *("First token, s", "Faster by", "FLOPs say"),
)


def markdown(table: Table, measured: list[dict[str, Any]]) -> list[str]:
    """One table of the paper, with the measured rows of the JSON file."""
    by_name = {(row["table"], row["precision"], row["method"]): row for row in measured}
    lines = []
    for precision, (weights, bits) in PRECISIONS.items():
        for row in table.rows:
            cells = [row.method, row.schedule, precision.upper(), f"{WEIGHTS[weights]}, {bits} bits"]
            figures = by_name.get((table.number, precision, row.method))
            cells += _planned(table, row, bits) if figures is None else _measured(table, figures)
            lines.append(cells)
    return markdown_table(HEAD, lines)


def _measured(table: Table, row: dict[str, Any]) -> list[str]:
    speedup = row["speedup"]
    whole = row["layers"] == WHOLE_MODELS[table.size]
    return [
        "measured" if whole else f"measured, {row['layers']} layers",
        f"{row['flops'] / 1e12:.2f}",
        f"{row['kv_bytes'] / 1e6:.1f}",
        ranged(row["ttft_seconds"]),
        f"{speedup['median']:.2f}x ({speedup['min']:.2f}-{speedup['max']:.2f})",
        f"{row['predicted_speedup']:.2f}x",
    ]


def _planned(table: Table, row: Row, bits: int) -> list[str]:
    shape = model_shape(model.config(WHOLE_MODELS[table.size], table.size))
    stock, cost = (
        estimate(shape, token_plan(one, shape), num_text_tokens=table.num_text_tokens)
        for one in (table.rows[0], row)
    )
    return [
        "planned",
        f"{cost.decoder_flops / 1e12:.2f}",
        f"{cost.kv_bytes * bits / 16 / 1e6:.1f}",
        "",
        "",
        f"{stock.total_flops / cost.total_flops:.2f}x",
    ]
