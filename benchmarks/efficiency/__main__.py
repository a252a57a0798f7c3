"""`make bench-efficiency`: the rows of the paper's Tables 8 and 9, measured on whole models.

One engine of FiCoCo-VL for each model and precision that fits this machine's memory, with made-up weights. Its requests
take turns, each row's with the budgets of that row. Products and KV blocks are counted in the engine, seconds run from
pixels to the first token, speed-ups are taken round by round against the request without reduction.
"""

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import psutil

from ficoco_vllm.benchmarks.efficiency import worker
from ficoco_vllm.benchmarks.efficiency.tables import PRECISIONS, SETTINGS, STOCK, TABLES, Table, markdown
from ficoco_vllm.benchmarks.harness import model
from ficoco_vllm.benchmarks.harness.engine import bench_engine
from ficoco_vllm.benchmarks.harness.model import WHOLE_MODELS
from ficoco_vllm.benchmarks.harness.quantization import runs_here
from ficoco_vllm.benchmarks.harness.results import Bar, at_most, environment, make_parser, report, write
from ficoco_vllm.benchmarks.harness.rounds import ratios, spread, take_turns
from ficoco_vllm.reduction.cost import ModelShape, estimate, unreduced

# Beside the weights: tower, KV cache, what the process has before, and one layer twice while it is repacked.
ROOM_BYTES = 4 * 2**30


def main() -> int:
    """Run the benchmark, write its JSON after each model, print its table and bars."""
    parser = make_parser(__doc__, "efficiency")
    parser.add_argument("--sizes", nargs="+", choices=list(WHOLE_MODELS), default=list(WHOLE_MODELS))
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=3, help="measured requests of each row")
    args = parser.parse_args()
    head = {"environment": environment(), "seed": args.seed}
    # Rows of earlier runs stay, if they are of the same machine and versions; the large models take long.
    earlier = json.loads(args.out.read_text("utf-8")) if args.out.is_file() else {}
    rows = earlier["rows"] if head.items() <= earlier.items() else []
    for table, precision in product(TABLES, PRECISIONS):
        if table.size not in args.sizes or precision not in args.precisions:
            continue
        if reason := _obstacle(table.shape, precision):
            print(f"{table.size} {precision}: {reason}; planned only", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            model.write(Path(folder), WHOLE_MODELS[table.size], table.size, PRECISIONS[precision][0])
            new = measure(folder, table, precision, table.shape, args.rounds, random.Random(args.seed))
        rows = [row for row in rows if (row["table"], row["precision"]) != (table.number, precision)] + new
        write(head | {"rows": rows}, args.out)
    if not rows:
        parser.error("none of these models fits into the memory of this machine")
    print(head["environment"])
    for table in TABLES:
        print("\n".join(markdown(table, rows)))
    return report(bars(rows))


def bars(rows: list[dict[str, Any]]) -> Iterator[Bar]:
    """The bars: FLOPs and KV bytes of the engine are those of the plan."""
    flops = max(abs(row["flops"] / row["planned_flops"] - 1) for row in rows)
    yield at_most("efficiency-flops-off-plan", flops, 0.0001)
    blocks = max(abs(row["kv_bytes"] - row["planned_kv_bytes"]) for row in rows)
    yield at_most("efficiency-kv-bytes-off-plan", blocks)


def _obstacle(shape: ModelShape, precision: str) -> str | None:
    """Why a model cannot run here."""
    weights, _ = PRECISIONS[precision]
    if not runs_here(weights):
        return "vLLM has no such product on this CPU"
    needed = estimate(shape, unreduced(shape), num_text_tokens=1, dtype=precision).weight_bytes + ROOM_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        return f"needs {needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} are free"
    return None


def measure(
    folder: str, table: Table, precision: str, shape: ModelShape, rounds: int, order: random.Random
) -> list[dict[str, Any]]:
    """All rows of one model and precision, as in the JSON file: counts and times with what the planner says."""
    bits = PRECISIONS[precision][1]
    limits = {
        "max_model_len": worker.MAX_MODEL_LEN,
        "max_num_batched_tokens": worker.MAX_MODEL_LEN,
        "max_num_seqs": 1,
        "block_size": worker.BLOCK_SIZE,
        "kv_cache_memory_bytes": 2**30,
        "enable_prefix_caching": False,  # counts of tokens as in the plan, not rounded to blocks
        "kv_cache_dtype": "auto" if bits == 16 else "fp8",
    }
    with bench_engine(folder, SETTINGS, **limits) as engine:
        engine.call(worker.set_scales)
        asks = {
            row.method: partial(engine.call, worker.measure, row, table.num_text_tokens) for row in table.rows
        }
        samples = take_turns(asks, rounds, order, f"{table.size} {precision}")
    times = {name: [sample["ttft_seconds"] for sample in mine] for name, mine in samples.items()}
    measured = []
    for row in table.rows:
        seconds, cost = times[row.method], table.cost(row, shape)
        ((flops, kv_bytes),) = {(sample["flops"], sample["kv_bytes"]) for sample in samples[row.method]}
        tokens = [table.num_text_tokens + visual for visual in row.plan(shape).decoder[:-1]]
        slots = sum(-(-count // worker.BLOCK_SIZE) * worker.BLOCK_SIZE for count in tokens)
        measured.append(
            {
                "table": table.number,
                "precision": precision,
                "method": row.method,
                "rounds": rounds,
                "flops": flops,
                "planned_flops": cost.decoder_flops,
                "kv_bytes": kv_bytes,
                "planned_kv_bytes": slots * 2 * shape.decoder.kv_width * bits // 8,
                "resident_bytes": max(sample["resident_bytes"] for sample in samples[row.method]),
                "ttft_seconds": spread(seconds),
                "speedup": spread(ratios(times[STOCK.method], seconds)),
                "predicted_speedup": table.cost(STOCK, shape).total_flops / cost.total_flops,
            }
        )
    return measured


if __name__ == "__main__":
    sys.exit(main())
