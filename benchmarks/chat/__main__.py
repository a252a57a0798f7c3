"""`make bench-chat`: time to first token of later turns, and after a shared system prompt, with a prefix cache.

Stock vLLM with its prefix cache and FiCoCo-L with decision windows take turns, round by round; FiCoCo-L also computes
every prompt as a whole. Times are compared within a round. The tower is LLaVA-1.5-7B's, the decoder is cut in depth and
width. On a CPU stock vLLM also runs in model runner V2, as FiCoCo-L does: part of a difference is the runner's.
"""

import json
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.chat import worker
from ficoco_vllm.benchmarks.harness import model
from ficoco_vllm.benchmarks.harness.engine import Remote, bench_engine
from ficoco_vllm.benchmarks.harness.results import (
    Bar,
    at_most,
    environment,
    make_parser,
    print_table,
    report,
    write,
)
from ficoco_vllm.benchmarks.harness.rounds import Sample, ranged, ratios, spread, take_turns
from ficoco_vllm.compat import is_cpu_build

SETTINGS = {"method": "ficoco-l", "keep": 64, "windows": "turn"}
# Time to first token over stock's, each with its cache.
MOST_TIME = 1.1
STOCK, STOCK_V2, OURS = "stock", "stock, model runner V2", "ficoco-l"
# Share of the tokens of stock's later turns that come from its cache: above 0.
LEAST_CACHED = 0.01
MEASURES = {"chat": worker.image_chat, "system prompt": worker.shared_system_prompt}


def main() -> int:
    """Run the benchmark, write its JSON, print its bars."""
    parser = make_parser(__doc__, "chat")
    parser.add_argument("--layers", type=int, default=8, help="of the decoder (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="of the decoder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="that count (default: %(default)s)")
    args = parser.parse_args()
    options = {"block_size": 32, "max_model_len": 1536, "max_num_batched_tokens": 1536, "max_num_seqs": 4}
    options |= {"kv_cache_memory_bytes": 2**30, "disable_log_stats": False}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_model(Path(folder), args.layers, args.width)
        starting = {
            STOCK: bench_engine(folder, None, **options),
            OURS: bench_engine(folder, SETTINGS, **options),
        }
        if is_cpu_build():
            starting[STOCK_V2] = bench_engine(folder, None, "V2", **options)
        engines = {row: stack.enter_context(engine) for row, engine in starting.items()}
        kinds = {name: measure(name, engines, args.rounds, args.seed) for name in MEASURES}
    shape = {"layers": args.layers, "width": args.width}
    result = {"environment": environment(), **shape, "rounds": args.rounds, "seed": args.seed, "kinds": kinds}
    write(result, args.out)
    _print(result)
    return report(bars(result))


def write_model(folder: Path, num_layers: int, width: int) -> None:
    """Write a model folder without weights, with heads of 128."""
    path = model.write(folder, num_layers) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    heads = {"num_attention_heads": width // 128, "num_key_value_heads": width // 128, "head_dim": 128}
    config["text_config"] |= {"hidden_size": width, "intermediate_size": 11 * width // 4, **heads}
    path.write_text(json.dumps(config), encoding="utf-8")


def measure(name: str, engines: Mapping[str, Remote], rounds: int, seed: int) -> dict[str, dict[str, Any]]:
    """Figures of every engine with its cache, and of FiCoCo-L without."""
    function = MEASURES[name]
    asks = {row: partial(engine.call, function, False) for row, engine in engines.items()}
    asks[f"{OURS} without cache"] = partial(engines[OURS].call, function, True)
    samples = take_turns(asks, rounds, random.Random(seed), name)
    return {row: summarise(values, samples[STOCK]) for row, values in samples.items()}


def summarise(samples: list[Sample], stock: list[Sample]) -> dict[str, Any]:
    """Median and range of each figure, and of the time over that of stock vLLM in the same round."""
    figures = {key: [sample[key] for sample in samples] for key in samples[0]}
    figures["over_stock"] = ratios(figures["ttft_seconds"], [sample["ttft_seconds"] for sample in stock])
    return {key: spread(values) for key, values in figures.items()}


def bars(result: Mapping[str, Any]) -> Iterator[Bar]:
    """Later turns and requests after a system prompt are as fast as stock's, from the cache, and hold few blocks."""
    kinds = result["kinds"]
    for name, rows in kinds.items():
        label = f"chat-{name.replace(' ', '-')}-ttft-over-stock"
        yield at_most(label, rows[OURS]["over_stock"]["median"], MOST_TIME)
    chat, stock = kinds["chat"][OURS], kinds["chat"][STOCK]
    # Where stock's cache finds nothing, bars of ours that compare with it say nothing.
    yield Bar("chat-stock-cached-share", stock["cached_share"]["min"], LEAST_CACHED)
    yield Bar("chat-cached-share", chat["cached_share"]["min"], stock["cached_share"]["min"] * 0.95)
    ours, least = (kinds["system prompt"][row]["cached_tokens"]["min"] for row in (OURS, STOCK))
    yield Bar("chat-system-prompt-cached-tokens", ours, least)
    # A step may have taken the block of its next token.
    yield at_most("chat-kv-blocks-beyond-plan", chat["num_beyond_plan"]["max"], min(result["layers"], 8))


def _print(result: Mapping[str, Any]) -> None:
    for name, rows in result["kinds"].items():
        others = [key for key in rows[STOCK] if key not in ("ttft_seconds", "over_stock")]
        table = [
            (
                row,
                ranged(figures["ttft_seconds"], digits=3),
                ranged(figures["over_stock"]),
                *(f"{figures[key]['median']:.4g}" for key in others),
            )
            for row, figures in rows.items()
        ]
        print_table((name, "TTFT (min-max), s", "over stock", *others), table)


if __name__ == "__main__":
    sys.exit(main())
