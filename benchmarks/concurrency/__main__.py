"""`make bench-concurrency`: requests that run at the same time in the same KV memory.

One engine after the other gets the same number of bytes for its KV cache and more requests than fit, each with an image
of its own (576 visual tokens) and 60 tokens of text. The benchmark counts how many run when the next one must wait. It
compares the ratio to stock vLLM with the ratio of the planned tokens in the KV cache.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from ficoco_vllm.benchmarks.concurrency.worker import MOST_REQUESTS, NUM_DECODED, NUM_TEXT_TOKENS, fill
from ficoco_vllm.benchmarks.harness import model
from ficoco_vllm.benchmarks.harness.engine import bench_engine
from ficoco_vllm.benchmarks.harness.results import Bar, environment, make_parser, report, write
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.reduction.cost import model_shape

SHARE = 0.9
# Names to settings, stock vLLM first.
KINDS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "V 64": {"method": "ficoco-v", "keep": 64},
    "L 64": {"method": "ficoco-l", "keep": 64},
    "L 64 one-shot": {"method": "ficoco-l", "keep": 64, "schedule": "one-shot"},
    "VL 64": {"method": "ficoco-vl", "keep": 64},
}
NUM_PATCHES, NUM_LAYERS = model.PATCHES, model.WHOLE_MODELS["7b"]
# Requests of stock vLLM that the KV cache holds.
STOCK_REQUESTS = 12
TOKEN_LAYER_BYTES = 2 * model.NARROW_WIDTH * 2  # keys and values in bfloat16


def main() -> int:
    """Run the benchmark, write its JSON, print its bars."""
    args = make_parser(__doc__, "concurrency", seed=False).parse_args()
    kv_bytes = memory(STOCK_REQUESTS)
    with tempfile.TemporaryDirectory() as folder:
        model.write(Path(folder), NUM_LAYERS, narrow=True)
        rows = measure(folder, KINDS, kv_bytes)
    write({"environment": environment(), "kv_bytes": kv_bytes, "kinds": rows}, args.out)
    return report(bars(rows))


def memory(num_requests: int) -> int:
    """Bytes of a KV cache that holds a number of stock vLLM's requests."""
    return num_requests * (NUM_TEXT_TOKENS + NUM_PATCHES + NUM_DECODED) * NUM_LAYERS * TOKEN_LAYER_BYTES


def measure(
    folder: str, kinds: Mapping[str, dict[str, Any] | None], kv_bytes: int
) -> dict[str, dict[str, float]]:
    """Fill one engine after the other; a row for each kind, as in the JSON."""
    limits = {"max_model_len": 1024, "max_num_batched_tokens": 4096, "max_num_seqs": MOST_REQUESTS}
    limits |= {"block_size": 32, "kv_cache_memory_bytes": kv_bytes, "enable_prefix_caching": False}
    rows: dict[str, dict[str, float]] = {}
    for name, ficoco in kinds.items():
        with bench_engine(folder, ficoco, **limits) as engine:
            row = rows[name] = {"mean_kv_tokens": mean_tokens(ficoco), "num_running": engine.call(fill)}
        row["ratio"] = row["num_running"] / rows["stock"]["num_running"]
        row["predicted_ratio"] = rows["stock"]["mean_kv_tokens"] / row["mean_kv_tokens"]
        print(f"{name:14} {json.dumps(row)}", flush=True)
    return rows


def mean_tokens(ficoco: dict[str, Any] | None) -> float:
    """Tokens of a prompt in the KV cache, averaged over the layers, as planned."""
    if ficoco is None:
        return float(NUM_TEXT_TOKENS + NUM_PATCHES)
    plan = ServerPlan.for_model(FicocoConfig.parse(ficoco), model_shape(model.config(NUM_LAYERS)))
    return NUM_TEXT_TOKENS + fmean(plan.image_tokens().decoder[:-1])


def bars(rows: Mapping[str, Mapping[str, float]]) -> list[Bar]:
    """The bars: nearly as many requests run as the plan predicts."""
    return [
        Bar(
            f"concurrency-{name.replace(' ', '-')}-of-predicted", row["ratio"] / row["predicted_ratio"], SHARE
        )
        for name, row in rows.items()
        if name != "stock"
    ]


if __name__ == "__main__":
    sys.exit(main())
