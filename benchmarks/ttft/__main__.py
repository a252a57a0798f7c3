"""`make bench-ttft`: stock vLLM and ours take turns, request by request, in one run.

Both engines run on the same machine; images are random and never repeated, one request at a time. A speed-up is stock's
time over ours, round by round; the bars compare it with what a roofline predicts for the same prompt, whose ceilings,
arithmetic and memory, are measured first. The roofline's times are held against the measured ones, too. The decoder is
cut to a few layers to fit memory. Methods of the tower are run at each depth; the median time outside the tower is
extrapolated linearly to all layers. Methods of the decoder are run at `--decoder-layers` only, since the layers in
which they reduce do not scale with the depth.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean, linear_regression, median
from typing import Any

import torch

from ficoco_vllm.benchmarks.harness.device import measure as ceilings
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
from ficoco_vllm.benchmarks.harness.rounds import ranged, ratios, spread, take_turns
from ficoco_vllm.benchmarks.ttft import worker
from ficoco_vllm.benchmarks.ttft.kinds import Kind, kinds, predicted_speedup, predicted_ttft, token_plan
from ficoco_vllm.benchmarks.ttft.models import MODELS, NUM_TEXT_TOKENS
from ficoco_vllm.benchmarks.ttft.models import write as write_model
from ficoco_vllm.reduction.cost import Device

# Without a prefix cache methods of the decoder keep as many tokens as the plan says, not whole blocks of them.
LIMITS: Mapping[str, Any] = {
    "max_model_len": 1024,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 1,
    "kv_cache_memory_bytes": 2**30,
    "enable_prefix_caching": False,
}
SPEEDUP_SHARE = 0.9
REDUCTION_SHARE = 0.05
# A roofline is a lower bound: times below it mean wrong ceilings. How far above it they may be.
ROOFLINE_EXCESS, ROOFLINE_SHARE = 1.1, 0.5


def main() -> int:
    """Run the benchmark, write its JSON, print its bars."""
    parser = make_parser(__doc__, "ttft")
    add = parser.add_argument
    add("--layers", type=int, nargs="+", help="decoder layers to run with (default: two that fit 24 GB)")
    which = "those of --layers to run ficoco-l and -vl with (default: 8)"
    add("--decoder-layers", type=int, nargs="*", default=[8], help=which)
    which = "a model whose widths it has; 7b and 13b are LLaVA-1.5 (default: %(default)s)"
    add("--model-size", default="7b", choices=list(MODELS), help=which)
    add("--rounds", type=int, default=5, help="measured requests of each kind")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    args.layers = args.layers or list(MODELS[args.model_size].depths)
    if len(set(args.layers)) < 2:
        parser.error("--layers needs two depths at least, to extrapolate to the whole model")
    unknown = sorted(set(args.decoder_layers) - set(args.layers))
    if unknown:
        parser.error(f"--decoder-layers: {unknown[0]} is not one of --layers")
    device = ceilings(getattr(torch, args.dtype))
    runs = [_run(num_layers, device, args) for num_layers in args.layers]
    result: dict[str, Any] = {
        "environment": environment(),
        **{name: getattr(args, name) for name in ("dtype", "seed", "model_size")},
        "ceilings": asdict(device),
        "runs": runs,
        "whole_model": _extrapolate(runs, device, args.model_size),
    }
    write(result, args.out)
    _print(result)
    return report(bars(result))


def bars(result: Mapping[str, Any]) -> Iterator[Bar]:
    """The bars: prompts as planned, nearly the predicted speed-up, and a cheap reduction."""
    size = result.get("model_size", "7b")
    rows, smallest = kinds(size), f"keep-{MODELS[size].keeps[-1]}"
    for run in result["runs"]:
        around = NUM_TEXT_TOKENS + MODELS[size].num_around
        planned = {name: token_plan(rows[name], run["layers"], size).decoder[0] for name in run["kinds"]}
        amiss = [abs(row["num_prompt_tokens"] - around - planned[name]) for name, row in run["kinds"].items()]
        yield at_most(f"ttft-prompt-tokens-amiss-{run['layers']}-layers", max(amiss))
        for name, row in run["kinds"].items():
            if name == smallest or rows[name].in_decoder:
                share = row["speedup"] / row["predicted_speedup"]
                yield Bar(f"ttft-{name}-of-predicted-{run['layers']}-layers", share, SPEEDUP_SHARE)
        share = run["kinds"][smallest]["reduction_share_of_tower"]
        yield at_most(f"reduction-share-of-tower-{run['layers']}-layers", share, REDUCTION_SHARE)
        shares = [row["roofline_share"] for row in run["kinds"].values()]
        name = f"ttft-roofline-of-measured-{run['layers']}-layers"
        yield Bar(name, min(shares), ROOFLINE_SHARE)
        yield at_most(f"{name}-at-most", max(shares), ROOFLINE_EXCESS)
    whole = result["whole_model"][smallest]
    share = whole["speedup"] / whole["predicted_speedup"]
    name = f"ttft-{smallest}-of-predicted-{MODELS[size].num_layers}-layers-extrapolated"
    yield Bar(name, share, SPEEDUP_SHARE)


def _run(num_layers: int, device: Device, args: argparse.Namespace) -> dict[str, Any]:
    """All kinds of one depth: those of one engine at a time, each group beside stock vLLM."""
    size = args.model_size
    in_decoder = num_layers in args.decoder_layers
    stock, *ours = (kind for kind in kinds(size).values() if in_decoder or not kind.in_decoder)
    order = random.Random(args.seed)
    summary: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), num_layers, size)
        with engine(folder, stock, args.dtype) as theirs:
            for _, kinds_of_engine in groupby(ours, lambda kind: kind.settings):
                group = list(kinds_of_engine)
                with engine(folder, group[0], args.dtype) as reducing:
                    samples = measure_in_turns(num_layers, theirs, reducing, group, args.rounds, order)
                # Stock vLLM is run again beside each engine; its own row is that of the first group.
                summary |= summarise(num_layers, samples, device, size) | summary
    return {"layers": num_layers, "rounds": args.rounds, "kinds": summary}


def measure_in_turns(
    num_layers: int, theirs: Remote, ours: Remote, group: Sequence[Kind], rounds: int, order: random.Random
) -> dict[str, list[dict[str, float]]]:
    """Results of `worker.measure` in every round, by the name of the kind; stock vLLM takes turns with ours."""
    asks = {"stock": partial(theirs.call, worker.measure, None, 1)}
    for kind in group:
        asks[kind.name] = partial(ours.call, worker.measure, None if kind.in_decoder else kind.keep, 1)
    return take_turns(asks, rounds, order, f"{num_layers} layers")


def engine(folder: Path | str, kind: Kind, dtype: str) -> AbstractContextManager[Remote]:
    """An engine in a process of its own, which ends with the block."""
    return bench_engine(folder, kind.settings, dtype=dtype, **LIMITS)


def summarise(
    num_layers: int, samples: dict[str, list[dict[str, float]]], device: Device, size: str = "7b"
) -> dict[str, dict[str, Any]]:
    """Medians and ratios of each kind, as in the JSON."""
    unreduced = [sample["ttft_seconds"] for sample in samples["stock"]]
    summary: dict[str, dict[str, Any]] = {}
    for name, rows in samples.items():
        kind, seconds = kinds(size)[name], [row["ttft_seconds"] for row in rows]
        speedup = spread(ratios(unreduced, seconds))
        predicted = predicted_ttft(kind, num_layers, device, size)
        summary[name] = {
            "num_prompt_tokens": rows[0]["num_prompt_tokens"],
            **{f"ttft_seconds_{which}": value for which, value in spread(seconds).items()},
            "tower_seconds_median": median(row["tower_seconds"] for row in rows),
            "reduction_seconds_median": median(row["reduction_seconds"] for row in rows),
            "reduction_share_of_tower": median(
                row["reduction_seconds"] / row["tower_seconds"] for row in rows
            ),
            "speedup": speedup["median"],
            "speedup_min": speedup["min"],
            "speedup_max": speedup["max"],
            "predicted_speedup": predicted_speedup(kind, num_layers, device, size),
            "predicted_ttft_seconds": predicted,
            "roofline_share": predicted / median(seconds),
        }
    return summary


def _extrapolate(runs: list[dict[str, Any]], device: Device, size: str) -> dict[str, dict[str, float]]:
    """Median of each kind at the whole model's number of layers.

    The tower is the same at each depth, so its time is averaged; the rest is extrapolated on a least-squares line.
    """
    whole_model: dict[str, dict[str, float]] = {}
    num_layers = MODELS[size].num_layers
    for kind in kinds(size).values():
        if kind.in_decoder:
            continue
        rows = [run["kinds"][kind.name] for run in runs]
        rest = [row["ttft_seconds_median"] - row["tower_seconds_median"] for row in rows]
        slope, intercept = linear_regression([run["layers"] for run in runs], rest)
        seconds = fmean(row["tower_seconds_median"] for row in rows) + intercept + slope * num_layers
        row = whole_model[kind.name] = {"ttft_seconds": seconds}
        row["speedup"] = whole_model["stock"]["ttft_seconds"] / seconds
        row["predicted_speedup"] = predicted_speedup(kind, num_layers, device, size)
    return whole_model


def _print(result: dict[str, Any]) -> None:
    ceiling = result["ceilings"]
    print(f"\n{ceiling['flops'] / 1e9:.0f} GFLOP/s, {ceiling['bandwidth'] / 1e9:.1f} GB/s, measured first")
    print(f"{json.dumps(result['environment'])}, {result['dtype']}, one request at a time")
    head = ["TTFT median (min-max), s", "roofline of it", "speed-up (min-max)"]
    head += ["predicted", "tower, s", "reduction share"]
    for run in result["runs"]:
        rows = [
            (
                name,
                ranged(row, "ttft_seconds_", 3),
                f"{row['roofline_share']:.0%}",
                f"{row['speedup']:.2f} ({row['speedup_min']:.2f}-{row['speedup_max']:.2f})",
                f"{row['predicted_speedup']:.2f}",
                f"{row['tower_seconds_median']:.3f}",
                f"{row['reduction_share_of_tower']:.1%}",
            )
            for name, row in run["kinds"].items()
        ]
        print_table((f"{run['layers']} decoder layers, {run['rounds']} rounds", *head), rows)
    whole = [
        (name, f"{row['ttft_seconds']:.3f}", f"{row['speedup']:.2f}", f"{row['predicted_speedup']:.2f}")
        for name, row in result["whole_model"].items()
    ]
    num_layers = MODELS[result["model_size"]].num_layers
    print_table((f"{num_layers} decoder layers, extrapolated", "TTFT, s", "speed-up", "predicted"), whole)


if __name__ == "__main__":
    sys.exit(main())
