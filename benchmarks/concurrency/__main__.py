"""`make bench-concurrency`: requests that run at once under the same KV memory.

One engine after the other is given the same number of bytes for its KV cache and as many requests as it takes, each
with an image of its own (576 visual tokens) and 60 tokens of text. Counted is how many run when the next one has to
wait. The ratio to stock vLLM is held against the ratio of tokens in the KV cache that the plan predicts.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from ficoco_vllm.benchmarks.bars import Bar, environment, report
from ficoco_vllm.benchmarks.concurrency import model, worker
from ficoco_vllm.benchmarks.concurrency.kinds import KINDS
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.decoder import DecoderPlanner

RESULTS = Path(__file__).parent.parent / "results" / "concurrency.json"
SHARE = 0.9
NUM_PATCHES, NUM_LAYERS = 576, 32
# Room for so many of stock vLLM's prompts: bytes of a token in one layer are 2 * 128 * 2.
STOCK_REQUESTS = 12
TOKEN_LAYER_BYTES = 2 * model.WIDTH * 2


def main() -> int:
    """Run the benchmark, write its JSON, print its bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    kv_bytes = memory(STOCK_REQUESTS)
    with tempfile.TemporaryDirectory() as folder:
        model.write(Path(folder))
        rows = measure(folder, KINDS, kv_bytes)
    result = {"environment": environment(), "kv_bytes": kv_bytes, "kinds": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    return report(bars(rows))


def memory(num_requests: int) -> int:
    """Bytes of a KV cache with room for so many of stock vLLM's requests."""
    prompt = worker.NUM_TEXT_TOKENS + NUM_PATCHES
    return num_requests * (prompt + worker.NUM_DECODED) * NUM_LAYERS * TOKEN_LAYER_BYTES


def measure(
    folder: str, kinds: Mapping[str, dict[str, Any] | None], kv_bytes: int
) -> dict[str, dict[str, float]]:
    """Fill one engine after the other.

    Args:
        folder: of the model.
        kinds: names to settings; stock vLLM first.
        kv_bytes: memory of each KV cache.

    Returns:
        A row for each kind, as it stands in the JSON.
    """
    rows: dict[str, dict[str, float]] = {}
    for name, ficoco in kinds.items():
        tokens = mean_tokens(ficoco)
        counted = _count(folder, ficoco, kv_bytes)
        rows[name] = {"mean_kv_tokens": tokens, **counted}
        rows[name]["ratio"] = counted["num_running"] / rows["stock"]["num_running"]
        rows[name]["predicted_ratio"] = rows["stock"]["mean_kv_tokens"] / tokens
        print(f"{name:14} {json.dumps(rows[name])}", flush=True)
    return rows


def bars(rows: Mapping[str, Mapping[str, float]]) -> list[Bar]:
    """What the benchmark promises: nearly as many requests at once as the plan says.

    Args:
        rows: `kinds` of the JSON file.
    """
    return [
        Bar(
            f"concurrency-{name.replace(' ', '-')}-of-predicted",
            row["ratio"] / row["predicted_ratio"],
            SHARE,
        )
        for name, row in rows.items()
        if name != "stock"
    ]


def mean_tokens(ficoco: dict[str, Any] | None) -> float:
    """Tokens of a prompt in the KV cache, averaged over the layers, as planned."""
    visual = float(NUM_PATCHES)
    if ficoco is not None:
        config = FicocoConfig.parse(ficoco)
        visual = float(config.tower_part(NUM_PATCHES).keep or NUM_PATCHES)
        if config.decoder_method is not None:
            planner = DecoderPlanner.shared(config, NUM_LAYERS, int(visual))
            visual = fmean(planner.counts(planner.method, int(visual), planner.keep))
    return worker.NUM_TEXT_TOKENS + visual


def _count(folder: str, ficoco: dict[str, Any] | None, kv_bytes: int) -> dict[str, int]:
    in_decoder = ficoco is not None and FicocoConfig.parse(ficoco).decoder_method is not None
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=worker.run, args=(there, folder, ficoco, kv_bytes, in_decoder))
    process.start()
    there.close()
    counted: dict[str, int] = here.recv()
    process.join()
    return counted


if __name__ == "__main__":
    sys.exit(main())
