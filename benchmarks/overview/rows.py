"""Rows of the tables, and which figures of the committed results belong to each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Name of a benchmark to the content of its committed JSON.
Results = Mapping[str, Mapping[str, Any]]

PATCHES = 576
# LLaVA-1.5-7B: keys and values of 32 layers, 4,096 wide, 2 bytes a value.
KV_BYTES_PER_TOKEN = 32 * 2 * 4096 * 2


@dataclass(frozen=True)
class Row:
    """A served configuration.

    Attributes:
        tokens: visual tokens of an image, as a buyer reads it.
        ttft: name in the results of `make bench-ttft`.
        concurrency: name in the results of `make bench-concurrency`, or None where it was not counted.
    """

    label: str
    tokens: str
    ttft: str
    concurrency: str | None = None

    def kv_megabytes(self, results: Results) -> float:
        """KV cache of one prompt in LLaVA-1.5-7B, fp16, decimal megabytes."""
        if self.concurrency is None:  # a method of the tower: every layer holds the whole prompt
            tokens = shallowest(results)["kinds"][self.ttft]["num_prompt_tokens"]
        else:
            tokens = results["concurrency"]["kinds"][self.concurrency]["mean_kv_tokens"]
        return float(tokens * KV_BYTES_PER_TOKEN / 1e6)


STOCK = Row("stock vLLM", str(PATCHES), "stock", "stock")
FICOCO_V = Row("FiCoCo-V, in the vision encoder", "64", "keep-64", "V 64")
FICOCO_VL = Row("FiCoCo-VL, in both", "64 in the last layers", "ficoco-vl", "VL 64")
FICOCO_L = Row("FiCoCo-L, in the decoder", "64 in the last layers", "ficoco-l", "L 64")
README_ROWS = (STOCK, FICOCO_V, FICOCO_VL, FICOCO_L)
ALL_ROWS = (
    STOCK,
    Row("FiCoCo-V, nothing removed", str(PATCHES), "keep-576"),
    Row("FiCoCo-V", "192", "keep-192"),
    Row("FiCoCo-V", "128", "keep-128"),
    FICOCO_V,
    FICOCO_VL,
    FICOCO_L,
    Row("FiCoCo-L, one-shot", "64 in the last layers", "ficoco-l-one-shot", "L 64 one-shot"),
)
# Methods in the README's table of accuracy: ours, and the two that lose least in tower and decoder.
README_METHODS = ("ficoco-v", "best", "ficoco-vl", "ficoco-l", "pyramiddrop")


def shallowest(results: Results) -> Mapping[str, Any]:
    """The run of `make bench-ttft` with the fewest decoder layers."""
    run: Mapping[str, Any] = min(results["ttft"]["runs"], key=lambda run: run["layers"])
    return run


def accuracies(results: Results) -> list[Mapping[str, Any]]:
    """Rows of both accuracy benchmarks that hold a method at a budget."""
    return [
        row
        for name in ("accuracy", "accuracy-decoder")
        for row in results[name]["rows"]
        if row["table"] == "methods" and row["method"]
    ]


def full_accuracy(results: Results) -> float:
    """Accuracy with all visual tokens, percent."""
    return next(
        float(row["accuracy"])
        for row in results["accuracy"]["rows"]
        if row["table"] == "methods" and row["label"] == "full"
    )


def largest_load(result: Mapping[str, Any]) -> str:
    """Name of the point of a load test with the most open requests."""
    traffic = {row["point"]: row["traffic"] for row in result["rows"]}
    return str(
        max(traffic, key=lambda name: (traffic[name]["rate"] is None, traffic[name]["concurrency"] or 0))
    )
