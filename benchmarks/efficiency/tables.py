"""The paper's Tables 8 and 9: their rows as requests to one engine of FiCoCo-VL, and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.benchmarks.harness.model import CHECKPOINTS, PATCHES
from ficoco_vllm.benchmarks.harness.pages import table as markdown_table
from ficoco_vllm.benchmarks.harness.quantization import Weights
from ficoco_vllm.benchmarks.harness.rounds import ranged
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tower import Budget
from ficoco_vllm.reduction.cost import KNOWN_MODELS, Estimate, ModelShape, TokenPlan, estimate, model_shape

# Weights and bits of the KV cache of the rows that the paper calls so. vLLM has no KV cache of 4 bits on a CPU.
PRECISIONS: dict[str, tuple[Weights, int]] = {"fp16": ("plain", 16), "int8": ("int8", 8), "int4": ("int4", 8)}
# Settings of the server; each request says how many tokens tower and decoder leave.
SETTINGS: dict[str, Any] = {"method": "ficoco-vl", "keep": 64, "schedule": "one-shot"}
_WEIGHTS = {"plain": "bfloat16", "int8": "W8A8", "int4": "W4A16"}
_HEAD = (
    *("Method", "Schedule", "Row", "Weights, KV cache", "Figures", "TFLOPs", "KV MB, in blocks"),
    *("First token, s", "Faster by", "FLOPs say"),
)


@dataclass(frozen=True)
class Row:
    """One row, as it is served.

    Attributes:
        tower: visual tokens that leave the tower; all 576 where the method works in the decoder only.
        decoder: those that are left after the first segment of the decoder; as many as enter where it does not reduce.
    """

    method: str
    tower: int = PATCHES
    decoder: int = PATCHES

    @property
    def schedule(self) -> str:
        """Schedule in words."""
        parts = [f"V: {self.tower}"] if self.tower < PATCHES else []
        parts += [f"L: {self.tower} in layers 1-4, {self.decoder} after"] if self.decoder < self.tower else []
        return ", ".join(parts) or "none"

    def plan(self, shape: ModelShape) -> TokenPlan:
        """Visual tokens layer by layer, as they are served."""
        plan = ServerPlan.for_model(FicocoConfig.parse(SETTINGS), shape)
        assert plan.decoder is not None
        counts = plan.decoder.counts(plan.decoder.method, self.tower, self.decoder)
        return plan.image_tokens(Budget(plan.tower.default.method, self.tower), counts)


@dataclass(frozen=True)
class Table:
    """One of the two tables; its first row is the model without reduction."""

    number: int
    size: str
    num_text_tokens: int
    rows: tuple[Row, ...]

    @property
    def shape(self) -> ModelShape:
        """Sizes of its model."""
        return model_shape(KNOWN_MODELS[CHECKPOINTS[self.size]])

    def cost(self, row: Row, shape: ModelShape) -> Estimate:
        """Cost of one row as it is planned, on a model of these sizes."""
        return estimate(shape, row.plan(shape), num_text_tokens=self.num_text_tokens)


STOCK = Row("LLaVA-1.5")
TABLES = (
    # FiCoCo-L's printed KV cache is below what it can reach from the 4th layer on; 64 tokens are left instead.
    Table(
        8, "7b", 60, (STOCK, Row("FiCoCo-V", 64, 64), Row("FiCoCo-L", decoder=64), Row("FiCoCo-VL", 70, 54))
    ),
    Table(
        9, "13b", 512, (STOCK, Row("FiCoCo-V", 84, 84), Row("FiCoCo-L", decoder=25), Row("FiCoCo-VL", 94, 74))
    ),
)


def markdown(table: Table, measured: Sequence[dict[str, Any]]) -> list[str]:
    """One table of the paper, with the measured rows of the JSON file; the others are marked as planned."""
    by_name = {(row["table"], row["precision"], row["method"]): row for row in measured}
    lines = []
    for precision, (weights, bits) in PRECISIONS.items():
        for row in table.rows:
            figures = by_name.get((table.number, precision, row.method))
            cells = _planned(table, row, bits) if figures is None else _measured(figures)
            precise = (precision.upper(), f"{_WEIGHTS[weights]}, {bits} bits")
            lines.append([row.method, row.schedule, *precise, *cells])
    return markdown_table(_HEAD, lines)


def _measured(row: dict[str, Any]) -> list[str]:
    speedup = row["speedup"]
    return [
        "measured",
        f"{row['flops'] / 1e12:.2f}",
        f"{row['kv_bytes'] / 1e6:.1f}",
        ranged(row["ttft_seconds"]),
        f"{speedup['median']:.2f}x ({speedup['min']:.2f}-{speedup['max']:.2f})",
        f"{row['predicted_speedup']:.2f}x",
    ]


def _planned(table: Table, row: Row, bits: int) -> list[str]:
    stock, cost = (table.cost(one, table.shape) for one in (STOCK, row))
    kv_megabytes = cost.kv_bytes * bits / 16 / 1e6
    faster = f"{stock.total_flops / cost.total_flops:.2f}x"
    return ["planned", f"{cost.decoder_flops / 1e12:.2f}", f"{kv_megabytes:.1f}", "", "", faster]
