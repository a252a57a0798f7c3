"""`make soak-engine`: 2,000 mixed requests to one engine that reduces in the decoder, some of them aborted.

The demo model with prefix cache, prompts in chunks and LoRA adapters; methods and budgets by request, no image, one or
two, and so few KV blocks that requests are preempted.
After every round of requests the engine is empty: then every block must be free again, in every group, no plan of a
request may be left, and the memory of the process must not keep growing.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ficoco_vllm import demo_model
from ficoco_vllm.benchmarks.harness.engine import IN_PROCESS, INTERPRETER, remote_engine
from ficoco_vllm.benchmarks.harness.results import Bar, at_most, environment, make_parser, report, write
from ficoco_vllm.benchmarks.soak.engine.adapters import write_adapter
from ficoco_vllm.benchmarks.soak.engine.mixture import NUM_DIFFERENT, PHASES
from ficoco_vllm.benchmarks.soak.engine.run import run
from ficoco_vllm.benchmarks.soak.growth import growth_bars
from ficoco_vllm.compat import is_cpu_build

# MiB for a thousand requests; a leak of one prompt's embeddings (636 x 256 bytes) would be 160.
MOST_GROWTH_MIB = 16.0
# Eight groups of 40 blocks hold one longest request, and one block is vLLM's.
ENGINE: dict[str, Any] = {
    "block_size": 32,
    "max_model_len": 1280,
    "max_num_seqs": 16,
    "num_gpu_blocks_override": 321,
    # A step holds one window with two images beside decoding requests.
    "max_num_batched_tokens": 1280,
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 8,
}
# Requests of a round, after which the engine's state is recorded.
NUM_PER_ROUND = 50
FICOCO = {"method": "ficoco-l", "keep": 64, "windows": "turn"}


def main() -> int:
    """Run, write the JSON, print the bars."""
    parser = make_parser(__doc__, "soak-engine")
    parser.add_argument("--requests", type=int, default=2000)
    args = parser.parse_args()
    variables = {**IN_PROCESS, "VLLM_CPU_KVCACHE_SPACE": "1", **(INTERPRETER if is_cpu_build() else {})}
    with (
        TemporaryDirectory() as name,
        remote_engine(demo_model.path(), FICOCO, variables, **ENGINE) as engine,
    ):
        adapters = [f"{name}/{seed}" for seed in range(2)]
        for seed, folder in enumerate(adapters):
            write_adapter(demo_model.path(), Path(folder), seed)
        result = engine.call(run, args.requests, NUM_PER_ROUND, args.seed, adapters)
    record = {"environment": environment(), "seed": args.seed, **result}
    write(record, args.out)
    print(json.dumps({key: value for key, value in record.items() if key not in ("rounds", "environment")}))
    return report(bars(record))


def bars(record: Mapping[str, Any]) -> list[Bar]:
    """The bars of a run."""
    start, rounds = record["start"], record["rounds"]
    lost = max(abs(start["num_free_blocks"] - look["num_free_blocks"]) for look in rounds)
    held = [max(counts) for counts in zip(*(look["num_held_blocks"] for look in rounds), strict=True)]
    answered = record["num_finished"] + sum(record["num_aborted"].values())
    repeats = rounds[-1]["num_requests"] > NUM_DIFFERENT  # the mixture begins anew
    return [
        at_most("soak-engine-blocks-not-free-again", lost),
        *(at_most(f"soak-engine-blocks-held-by-group-{i}", count) for i, count in enumerate(held)),
        at_most("soak-engine-plans-left", max(look["num_plans"] for look in rounds)),
        Bar("soak-engine-requests-answered-or-aborted", answered, rounds[-1]["num_requests"]),
        Bar("soak-engine-preemptions", record["num_preempted"], 1),
        Bar("soak-engine-prompts-in-chunks", record["num_in_chunks"], 1),
        Bar("soak-engine-answers-by-adapters", record["num_adapted"], 1),
        *([Bar("soak-engine-prefixes-found", record["num_found"], 1)] if repeats else []),
        *(Bar(f"soak-engine-aborts-{phase}", record["num_aborted"].get(phase, 0), 1) for phase in PHASES),
        *growth_bars("soak-engine-rss-growth-mib-per-1000-requests", rounds, "rss_mib", MOST_GROWTH_MIB),
    ]


if __name__ == "__main__":
    sys.exit(main())
