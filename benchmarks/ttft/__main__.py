"""`make bench-ttft`: stock vLLM and ours take turns, request by request, in one run.

Both engines run in eager mode on the same machine; images are random and never repeated, one request at a time.
A speed-up is stock's time over ours, round by round; it is held against the ratio of FLOPs that the planner
predicts for the same prompt. The bar is that of the whole model: the decoder is cut to a few layers to fit memory,
and the medians of the depths that were run are extrapolated linearly to 32 layers. In a cut model the vision tower,
most of which cannot be reduced, weighs more than in the whole one.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bars import Bar, environment, report
from benchmarks.ttft import model, worker
from benchmarks.ttft.table import RESULTS, WHOLE_MODEL
from ficoco_vllm.reduction.cost import Budget, estimate, model_shape, plan_tokens, unreduced

KEEPS = (576, 192, 128, 64)
SPEEDUP_SHARE = 0.9
# OpenMP's threads spin for 0.2 s after their work; one engine must not take the other's core with that.
SETTLE_SECONDS = 0.4
REDUCTION_SHARE = 0.05


def main() -> int:
    """Run the benchmark, write its JSON, print its bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8], help="decoder layers to run with")
    parser.add_argument("--rounds", type=int, default=7, help="measured requests of each kind")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if len(set(args.layers)) < 2:
        parser.error("--layers needs two depths at least, to extrapolate to the whole model")
    runs = [_run(num_layers, args) for num_layers in args.layers]
    result = {"environment": environment(), "dtype": args.dtype, "seed": args.seed, "runs": runs}
    result["whole_model"] = _extrapolate(runs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    _print(result)
    smallest = f"keep-{min(KEEPS)}"
    whole = result["whole_model"][smallest]
    bars = [Bar("ttft-speedup-64-of-predicted", whole["speedup"] / whole["predicted_speedup"], SPEEDUP_SHARE)]
    for run in runs:
        share = run["kinds"][smallest]["reduction_share_of_tower"]
        bars.append(
            Bar(f"reduction-share-of-tower-{run['layers']}-layers", share, REDUCTION_SHARE, at_least=False)
        )
    return report(bars)


def _run(num_layers: int, args: argparse.Namespace) -> dict[str, Any]:
    kinds: list[tuple[str, int]] = [("stock", max(KEEPS)), *((f"keep-{keep}", keep) for keep in KEEPS)]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name, _ in kinds}
    order = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        model.write(Path(folder), num_layers)
        engines = {stock: _start(folder, stock, args.dtype) for stock in (True, False)}
        for round_index in range(-1, args.rounds):  # the first round warms up and is not counted
            for name, keep in order.sample(kinds, len(kinds)):
                pipe = engines[name == "stock"]
                time.sleep(SETTLE_SECONDS)
                pipe.send((keep, order.getrandbits(32)))
                sample = pipe.recv()
                if round_index >= 0:
                    samples[name].append(sample)
                    print(
                        f"{num_layers} layers, round {round_index}, {name}: {sample['ttft_seconds']:.3f} s",
                        flush=True,
                    )
        for pipe in engines.values():
            pipe.send(None)
    return {"layers": num_layers, "rounds": args.rounds, "kinds": _summary(num_layers, samples)}


def _start(folder: str, stock: bool, dtype: str) -> Any:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=worker.run, args=(there, folder, stock, dtype), daemon=True).start()
    there.close()
    assert here.recv() == "ready"
    return here


def _summary(num_layers: int, samples: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    stock = [sample["ttft_seconds"] for sample in samples["stock"]]
    summary = {}
    for name, rows in samples.items():
        seconds = [row["ttft_seconds"] for row in rows]
        ratios = [before / after for before, after in zip(stock, seconds, strict=True)]
        summary[name] = {
            "num_prompt_tokens": rows[0]["num_prompt_tokens"],
            "ttft_seconds_median": statistics.median(seconds),
            "ttft_seconds_min": min(seconds),
            "ttft_seconds_max": max(seconds),
            "tower_seconds_median": statistics.median(row["tower_seconds"] for row in rows),
            "reduction_seconds_median": statistics.median(row["reduction_seconds"] for row in rows),
            "reduction_share_of_tower": statistics.median(
                row["reduction_seconds"] / row["tower_seconds"] for row in rows
            ),
            "speedup": statistics.median(ratios),
            "speedup_min": min(ratios),
            "speedup_max": max(ratios),
            "predicted_speedup": _predicted(num_layers, _keep(name)),
        }
    return summary


def _predicted(num_layers: int, keep: int) -> float:
    """Ratio of the FLOPs of one prompt, without reduction over with it."""
    shape = model_shape(model.config(num_layers))
    plans = (unreduced(shape), plan_tokens(shape, "ficoco-v", Budget(keep=keep)))
    full, reduced = (
        estimate(shape, plan, num_text_tokens=worker.NUM_TEXT_TOKENS).total_flops for plan in plans
    )
    return full / reduced


def _extrapolate(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Least-squares line of each kind's median over the number of layers, read off at the whole model's."""
    layers = [run["layers"] for run in runs]
    seconds = {}
    for name in runs[0]["kinds"]:
        medians = [run["kinds"][name]["ttft_seconds_median"] for run in runs]
        slope, intercept = statistics.linear_regression(layers, medians)
        seconds[name] = intercept + slope * WHOLE_MODEL
    return {
        name: {
            "ttft_seconds": found,
            "speedup": seconds["stock"] / found,
            "predicted_speedup": _predicted(WHOLE_MODEL, _keep(name)),
        }
        for name, found in seconds.items()
    }


def _keep(name: str) -> int:
    return max(KEEPS) if name == "stock" else int(name.removeprefix("keep-"))


def _print(result: dict[str, Any]) -> None:
    print(f"\n{json.dumps(result['environment'])}, {result['dtype']}, eager, one request at a time")
    for run in result["runs"]:
        print(f"{run['layers']} decoder layers, {run['rounds']} rounds")
        columns = (
            "TTFT median (min-max), s",
            "speed-up (min-max)",
            "FLOPs say",
            "tower, s",
            "of it reducing",
        )
        print(f"{'':10}{columns[0]:>28}{columns[1]:>24}{columns[2]:>11}{columns[3]:>10}{columns[4]:>16}")
        for name, row in run["kinds"].items():
            spread = f"{row['ttft_seconds_median']:.3f} ({row['ttft_seconds_min']:.3f}-{row['ttft_seconds_max']:.3f})"
            ratio = f"{row['speedup']:.2f} ({row['speedup_min']:.2f}-{row['speedup_max']:.2f})"
            print(
                f"{name:10}{spread:>28}{ratio:>24}{row['predicted_speedup']:>11.2f}"
                f"{row['tower_seconds_median']:>10.3f}{row['reduction_share_of_tower']:>16.1%}"
            )
    print(f"{WHOLE_MODEL} decoder layers, extrapolated")
    for name, row in result["whole_model"].items():
        print(
            f"{name:10}{row['ttft_seconds']:>28.3f}{row['speedup']:>24.2f}{row['predicted_speedup']:>11.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
