"""`make soak-decoder`: 2,000 mixed requests against one engine that reduces in the decoder, some given up.

The demo model, methods and budgets by request, one image, two or none, so few KV blocks that requests must give theirs
back. After every round of requests the engine is empty: then every block must be free again, in every group, nothing
may be remembered of any request, and the memory of the process must not keep growing.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from ficoco_vllm import demo_model
from ficoco_vllm.benchmarks.bars import Bar, environment, report
from ficoco_vllm.benchmarks.soak.load import PHASES
from ficoco_vllm.compat import set_cpu_defaults, use_interpreter

RESULTS = Path(__file__).parent.parent / "results" / "soak.json"
# Caches fill up and pools grow before that share of the requests, of which each comes many times.
WARM_UP_SHARE = 1 / 3
# Rounds behind the warm-up below which a slope says nothing.
LEAST_ROUNDS = 10
# MiB for a thousand requests; a leak of one prompt's embeddings (636 x 256 bytes) would be 160.
MOST_GROWTH_MIB = 16.0
# Eight groups of 40 blocks hold one longest request, and one block is vLLM's.
ENGINE = {"block_size": 32, "max_model_len": 1280, "max_num_seqs": 16, "num_gpu_blocks_override": 321}


def main() -> int:
    """Run, write the JSON, print the bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument(
        "--round", type=int, default=50, help="requests between two looks (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    set_cpu_defaults()
    use_interpreter()  # before vLLM is imported, which looks for Triton at once
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from ficoco_vllm.benchmarks.soak.drive import Settings, drive
    from tests.support.engine import make_engine

    settings = Settings(num_requests=args.requests, num_per_round=args.round, seed=args.seed)
    engine = make_engine(demo_model.path(), {"method": "ficoco-l", "keep": 64}, **ENGINE)
    start = time.monotonic()
    result = drive(engine, settings, lambda line: print(line, flush=True))
    record = {
        "environment": environment(),
        "seed": args.seed,
        "seconds": round(time.monotonic() - start),
        **result,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key not in ("rounds", "environment")}))
    return report(bars(record))


def bars(record: dict[str, Any]) -> list[Bar]:
    """What is promised.

    Args:
        record: of `drive`.
    """
    start, rounds = record["start"], record["rounds"]
    lost = max(abs(start["num_free_blocks"] - found["num_free_blocks"]) for found in rounds)
    held = [max(counts) for counts in zip(*(found["num_held_blocks"] for found in rounds), strict=True)]
    remembered = max(found["num_plans"] for found in rounds)
    answered = record["num_finished"] + sum(record["num_aborted"].values())
    found = [
        Bar("soak-blocks-not-free-again", lost, 0, at_least=False),
        *(Bar(f"soak-blocks-held-by-group-{i}", n, 0, at_least=False) for i, n in enumerate(held)),
        Bar("soak-plans-remembered", remembered, 0, at_least=False),
        Bar("soak-requests-answered-or-aborted", answered, rounds[-1]["num_requests"]),
        Bar("soak-preemptions", record["num_preempted"], 1),
        *(Bar(f"soak-aborts-{phase}", record["num_aborted"].get(phase, 0), 1) for phase in PHASES),
    ]
    later = [row for row in rounds if row["num_requests"] > WARM_UP_SHARE * rounds[-1]["num_requests"]]
    if len(later) >= LEAST_ROUNDS:
        found.append(
            Bar("soak-rss-growth-mib-per-1000-requests", growth(later), MOST_GROWTH_MIB, at_least=False)
        )
    return found


def growth(rounds: list[dict[str, Any]], memory: str = "rss_mib") -> float:
    """Slope of the memory, MiB for a thousand requests.

    Args:
        rounds: looks, each with `num_requests` and the memory.
        memory: name of its figure, MiB.
    """
    line = statistics.linear_regression(
        [row["num_requests"] / 1000 for row in rounds], [row[memory] for row in rounds]
    )
    return line.slope


if __name__ == "__main__":
    sys.exit(main())
