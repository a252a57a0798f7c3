"""`make bench-quantized`: time to first token with plain weights, INT8 (W8A8) and INT4 (W4A16).

First one engine with FiCoCo-V for each, side by side: all take turns, request by request, with 576 and with 64 visual
tokens. Then, for each and for FiCoCo-L and FiCoCo-VL, an engine of that method beside the one with 576 tokens. With 576
nothing is reduced and the engine is stock vLLM. Weights are made up, at LLaVA-1.5's true widths; the decoder is cut to
a few layers to fit memory. Ratios are taken round by round.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

from benchmarks.bars import environment
from benchmarks.ttft import model
from benchmarks.ttft.__main__ import SETTLE_SECONDS, engine
from benchmarks.ttft.kinds import KINDS, PATCHES, SMALLEST, WHOLE_MODELS, Kind, predicted_speedup
from benchmarks.ttft.quantization import Weights, runs_here

RESULTS = Path(__file__).parent.parent / "results"
# The engine of the second serves the first too: it is asked for by request.
ALL, FEW = KINDS[f"keep-{PATCHES}"], KINDS[f"keep-{SMALLEST}"]
IN_DECODER = ("ficoco-l", "ficoco-vl")
TITLES = {
    ALL.name: "576",
    FEW.name: "64, FiCoCo-V",
    "ficoco-l": "576 to 64, FiCoCo-L",
    "ficoco-vl": "192 to 64, FiCoCo-VL",
}

# Weights and kind of request.
Asked = tuple[str, Kind]
Samples = dict[tuple[str, str], list[float]]


def main() -> int:
    """Run the benchmark, write its JSON, print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-size", default="7b", choices=list(WHOLE_MODELS), help="widths of LLaVA-1.5")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of activations")
    parser.add_argument(
        "--weights",
        nargs="+",
        choices=get_args(Weights),
        help="default: all that vLLM computes on this machine",
    )
    parser.add_argument(
        "--methods", nargs="*", choices=IN_DECODER, default=list(IN_DECODER), help="besides FiCoCo-V"
    )
    parser.add_argument("--layers", type=int, default=8, help="of the decoder")
    parser.add_argument("--rounds", type=int, default=3, help="measured requests of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: quantized-SIZE.json of the results")
    args = parser.parse_args()
    possible = [weights for weights in get_args(Weights) if runs_here(weights, args.dtype)]
    args.weights = args.weights or possible
    if missing := [weights for weights in args.weights if weights not in possible]:
        parser.error(
            f"--weights: got {missing[0]!r}, which needs --dtype bfloat16 and a CPU with AVX-512 or a GPU; "
            f"allowed here: {', '.join(possible)}"
        )
    out = args.out or RESULTS / f"quantized-{args.model_size}.json"
    order = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        written = {
            weights: str(model.write(Path(folder) / weights, args.layers, args.model_size, weights))
            for weights in args.weights
        }
        side_by_side = [(weights, kind) for weights in args.weights for kind in (ALL, FEW)]
        rows = summary(_measure(written, side_by_side, args.rounds, order, args.dtype), args.weights)
        for weights in args.weights:
            for name in args.methods:
                pair = [(weights, ALL), (weights, KINDS[name])]
                # All tokens have their row already; here they are what the method is held against.
                rows += summary(_measure(written, pair, args.rounds, order, args.dtype), [weights])[1:]
    result = {
        "environment": environment(),
        "model_size": args.model_size,
        "dtype": args.dtype,
        "layers": args.layers,
        "rounds": args.rounds,
        "seed": args.seed,
        "predicted_speedup": {
            name: predicted_speedup(KINDS[name], args.layers, args.model_size)
            for name in (ALL.name, FEW.name, *args.methods)
        },
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{json.dumps(result['environment'])}\n{table(result)}")
    return 0


def table(result: dict[str, Any]) -> str:
    """The result in Markdown.

    Args:
        result: the content of the JSON file.
    """
    lines = [
        "| weights | visual tokens | first token, s (min-max) | over 576 tokens (min-max) | FLOPs say | "
        "over plain (min-max) |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [
            f"{row[name]['median']:.2f}{unit} ({row[name]['min']:.2f}-{row[name]['max']:.2f})"
            if name in row
            else "-"
            for name, unit in (("ttft_seconds", ""), ("over_all_tokens", "x"), ("over_first_weights", "x"))
        ]
        cells.insert(2, f"{result['predicted_speedup'][row['kind']]:.2f}x")
        lines.append(f"| {row['weights']} | {TITLES[row['kind']]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _measure(
    folders: dict[str, str], asked: Sequence[Asked], rounds: int, order: random.Random, dtype: str
) -> Samples:
    """Start the engines that are needed, and let them take turns.

    Args:
        folders: of the models, by their weights.
        asked: one request of each a round, in random order; the first round warms up and is not counted.
        rounds: that count.
        order: of the kinds, and the seed of the images.
        dtype: of activations.

    Returns:
        Seconds to the first token of each kind in every round.
    """
    samples: Samples = {(weights, kind.name): [] for weights, kind in asked}
    with ExitStack() as stack:
        pipes: dict[tuple[str, bool], Any] = {}
        for weights, kind in asked:
            if (weights, kind.in_decoder) not in pipes:
                started = engine(folders[weights], kind, dtype)
                pipes[weights, kind.in_decoder] = stack.enter_context(started)
        for round_index in range(-1, rounds):
            for weights, kind in order.sample(asked, len(asked)):
                time.sleep(SETTLE_SECONDS)
                pipe = pipes[weights, kind.in_decoder]
                pipe.send((kind.keep, order.getrandbits(32)))
                seconds = pipe.recv()["ttft_seconds"]
                if round_index >= 0:
                    samples[weights, kind.name].append(seconds)
                    print(f"round {round_index}, {weights}, {kind.name}: {seconds:.3f} s", flush=True)
    return samples


def summary(samples: Samples, weights: Sequence[str]) -> list[dict[str, Any]]:
    """Medians and spreads, in seconds and as ratios.

    Args:
        samples: weights and kind to the seconds of each round, measured in turns.
        weights: in order; the first of several is what the others are held against.
    """
    rows = []
    for (name, kind), seconds in samples.items():
        compared = {"over_all_tokens": samples[name, ALL.name]}
        if len(weights) > 1:
            compared["over_first_weights"] = samples[weights[0], kind]
        ratios = {
            key: [before / after for before, after in zip(other, seconds, strict=True)]
            for key, other in compared.items()
        }
        spreads = {
            key: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for key, values in {"ttft_seconds": seconds, **ratios}.items()
        }
        rows.append({"weights": name, "kind": kind, **spreads})
    return rows


if __name__ == "__main__":
    sys.exit(main())
