"""The rows of the paper's Tables 8 and 9 as requests to one engine of FiCoCo-VL."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.benchmarks.harness.model import PATCHES
from ficoco_vllm.benchmarks.harness.quantization import Weights
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tower import Budget
from ficoco_vllm.reduction.cost import ModelShape, TokenPlan

# Weights and bits of the KV cache of the rows that the paper calls so. vLLM has no KV cache of 4 bits on a CPU.
PRECISIONS: dict[str, tuple[Weights, int]] = {"fp16": ("plain", 16), "int8": ("int8", 8), "int4": ("int4", 8)}
# Settings of the server; each request says how many tokens tower and decoder leave.
SETTINGS: dict[str, Any] = {"method": "ficoco-vl", "keep": 64, "schedule": "one-shot"}


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
        """For the reader of a table."""
        parts = [f"V: {self.tower}"] if self.tower < PATCHES else []
        parts += [f"L: {self.tower} in layers 1-4, {self.decoder} after"] if self.decoder < self.tower else []
        return ", ".join(parts) or "none"


@dataclass(frozen=True)
class Table:
    """One of the two tables.

    Attributes:
        rows: the first is the model without reduction.
    """

    number: int
    size: str
    num_text_tokens: int
    rows: tuple[Row, ...]


TABLES = (
    # FiCoCo-L's printed KV cache is below what it can reach from the 4th layer on; 64 tokens are left instead.
    Table(
        8,
        "7b",
        60,
        (Row("LLaVA-1.5"), Row("FiCoCo-V", 64, 64), Row("FiCoCo-L", PATCHES, 64), Row("FiCoCo-VL", 70, 54)),
    ),
    Table(
        9,
        "13b",
        512,
        (Row("LLaVA-1.5"), Row("FiCoCo-V", 84, 84), Row("FiCoCo-L", PATCHES, 25), Row("FiCoCo-VL", 94, 74)),
    ),
)


def token_plan(row: Row, shape: ModelShape) -> TokenPlan:
    """Visual tokens layer by layer, as they are served."""
    plan = ServerPlan.for_model(FicocoConfig.parse(SETTINGS), shape)
    assert plan.decoder is not None
    counts = plan.decoder.counts(plan.decoder.method, row.tower, row.decoder)
    return plan.image_tokens(Budget(plan.tower.default.method, row.tower), counts)


def pairs() -> Iterator[tuple[Table, str]]:
    """Every table with every precision of it."""
    for table in TABLES:
        for precision in PRECISIONS:
            yield table, precision
