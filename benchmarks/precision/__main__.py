"""`make bench-precision`: what half precision and an fp8 KV cache change in a reduction.

Against the same model in float64 (of which only the scores are computed in float32, as the fused ops do):

- kept: share of the kept tokens that half precision chooses otherwise, after each reducing layer, on the trained demo
  model and on a tower of LLaVA-1.5's widths with random weights, whose tokens are nearly equal.
- log-probabilities: error of the demo model's first answer token, over bfloat16's own without a reduction, which has a
  bar, and over that of the same precision without one, which is reported only.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch

from ficoco_vllm.benchmarks.harness.results import (
    Bar,
    at_most,
    environment,
    make_parser,
    print_table,
    report,
    write,
)
from ficoco_vllm.benchmarks.precision import measure
from ficoco_vllm.benchmarks.questions.held_out import held_out
from ficoco_vllm.planning.families import tower_shape

METHODS = {"demo": ("ficoco-v", "evit", "divprune", "visionzip"), "wide": ("ficoco-v", "divprune")}
KEEP = 64
# A reduction may move a log-probability by this many times the error that bfloat16 makes without one.
MOST_TIMES = 3.0
# Share of the demo model's kept tokens that bfloat16 may choose otherwise.
MOST_DIFFERING = 0.2


def main() -> int:
    """Measure, write the JSON, print the tables and bars."""
    parser = make_parser(__doc__, "precision")
    parser.add_argument("--images", type=int, default=4, help="of each tower")
    parser.add_argument("--layers", type=int, help="of the wide tower (default: all 24)")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument(
        "--head-by-head",
        action="store_true",
        help="on a CPU of few cores, its own attention; by default a fused one, which rounds as a GPU's does",
    )
    args = parser.parse_args()
    fused = patch("ficoco_vllm.vision.tower.is_faster", return_value=False)
    with nullcontext() if args.head_by_head else fused:
        result = _measure(args)
    _print(result)
    return report(bars(result))


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    result: dict[str, Any] = {"environment": environment(), "settings": settings, "kept": {}}
    demo = measure.demo()
    wide, shape = measure.wide(args.layers, args.seed)
    side = wide.config.image_size
    towers = {
        "demo": (demo.model.vision_tower, tower_shape(demo.config), _pictures(args.images, args.seed)),
        "wide": (wide, shape, torch.randn(args.images, 3, side, side)),
    }
    for name, tower in towers.items():
        result["kept"][name] = {method: measure.differing(*tower, method, KEEP) for method in METHODS[name]}
        write(result, args.out)
    result["log_probabilities"] = measure.log_probabilities(args.questions, args.seed)
    result["error_ratios"] = ratios(result["log_probabilities"])
    write(result, args.out)
    return result


def bars(result: dict[str, Any]) -> Iterator[Bar]:
    """Limits on what half precision changes on trained weights; random ones have no answer to lose."""
    for method, rows in result["kept"]["demo"].items():
        yield at_most(f"precision-kept-{method}-bfloat16", rows["bfloat16"]["share"][-1], MOST_DIFFERING)
    for variant, rows in ratios(result["log_probabilities"]).items():
        for name, row in rows.items():
            yield at_most(f"precision-logprob-{variant}-{name}", row["over_bfloat16"], MOST_TIMES)


def ratios(
    log_probabilities: dict[str, dict[str, dict[str, float]]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean errors with a reduction over those without: bfloat16's, and the precision's own."""
    stock = log_probabilities["none"]
    return {
        variant: {
            name: {
                "over_bfloat16": row["mean"] / stock["bfloat16"]["mean"],
                "over_own": row["mean"] / stock[name]["mean"],
            }
            for name, row in rows.items()
        }
        for variant, rows in log_probabilities.items()
        if variant != "none"
    }


def _pictures(count: int, seed: int) -> torch.Tensor:
    """Held-out images as the demo model's processor hands them over."""
    from transformers import AutoImageProcessor

    from ficoco_vllm import demo_model

    processor = AutoImageProcessor.from_pretrained(demo_model.path())
    images = [one.scene.image for one in held_out("number_by_colour_2", count, seed)]
    pixels: torch.Tensor = processor(images, return_tensors="pt")["pixel_values"]
    return pixels


def _rows(variants: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for variant, precisions in variants.items():
        yield from ((f"{variant}, {name}", row) for name, row in precisions.items())


def _print(result: dict[str, Any]) -> None:
    print_table(
        ("kept otherwise", "first layer", "last layer", "features' error"),
        [
            (
                f"{tower}, {name}",
                *(f"{row['share'][layer]:.2%}" for layer in (0, -1)),
                f"{row['feature_error'][0]:.2e}",
            )
            for tower, methods in result["kept"].items()
            for name, row in _rows(methods)
        ],
    )
    print_table(
        ("error of a log-probability", "mean", "most", "other token"),
        [
            (name, f"{row['mean']:.4f}", f"{row['most']:.4f}", f"{row['changed']:.1%}")
            for name, row in _rows(result["log_probabilities"])
        ],
    )
    print_table(
        ("mean error, over that without a reduction", "of bfloat16", "of the same precision"),
        [
            (name, f"{row['over_bfloat16']:.2f}", f"{row['over_own']:.2f}")
            for name, row in _rows(result["error_ratios"])
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
