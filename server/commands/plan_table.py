"""The report of `ficoco-vllm plan` as a table for people."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ficoco_vllm.reduction import get
from ficoco_vllm.reduction.method import SITES
from ficoco_vllm.reduction.pipeline import PIPELINES

_ROWS = (
    ("vision tower, TFLOPs", "tower_flops", 1e12),
    ("projector, TFLOPs", "projector_flops", 1e12),
    ("LLM prefill, TFLOPs", "decoder_flops", 1e12),
    ("all, TFLOPs", "total_flops", 1e12),
    ("reduction itself, MFLOPs", "reduction_flops", 1e6),
    ("KV cache, MB", "kv_bytes", 1e6),
    ("weights, GB", "weight_bytes", 1e9),
    ("activations, GB", "activation_bytes", 1e9),
    ("total memory, GB", "memory_bytes", 1e9),
)


def as_text(report: Mapping[str, Any]) -> str:
    """The report as a table for people.

    Args:
        report: from `make_report`.

    Returns:
        Lines, without a newline at the end.
    """
    encoder, decoder = report["encoder_tokens"], report["decoder_visual_tokens"]
    tiled = "tiles" in report
    num_tokens = report["image_tokens"] if tiled else report["num_patches"]
    seen = "the base view" if tiled else "an image"
    lines = [
        f"{report['model']}: {report['method']}, {report['dtype']}, {report['num_text_tokens']} text tokens, "
        f"{report['num_images']} x {num_tokens} visual tokens",
        *(_tiles(report) if tiled else ()),
        "",
        f"Patch tokens of {seen} that enter each layer of the vision tower ([CLS] not counted)",
        *_runs(encoder),
        "Visual tokens of an image that enter each layer of the decoder",
        *_runs(decoder),
        f"  {'on average':<14}{report['mean_visual_tokens']:>8.1f}",
        "",
        f"{'':<26}{'no reduction':>14}{report['method']:>16}",
    ]
    for label, field, unit in _ROWS:
        before, after = (report[side][field] / unit for side in ("unreduced", "reduced"))
        lines.append(f"{label:<26}{before:>14.3f}{after:>16.3f}")
    gain = report["prefill_speedup"]
    lines += [
        "",
        f"Expected speed-up of prefill: {gain['memory_bound']:.2f}x where memory bandwidth is the limit,",
        f"{gain['compute_bound']:.2f}x where arithmetic is (long prompts, large batches).",
        "A multiply-add is 2 FLOPs; MB and GB are decimal. The reduction itself is counted as FiCoCo's (Eqs. 18, 19).",
        *_obstacles(report["method"]),
    ]
    return "\n".join(lines)


def _tiles(report: Mapping[str, Any]) -> list[str]:
    width, height = report["image_size"]
    tiles = ", ".join(f"{tile['kept']} of {tile['patches']}" for tile in report["tiles"])
    return [f"An image of {width} x {height} pixels: base view and tiles keep {tiles} patches"]


def _obstacles(method: str) -> list[str]:
    """Why a LLaVA cannot serve the method, if so: it can be planned for all the same."""
    if method in PIPELINES:
        return []
    reducer = get(method).configure()
    try:
        reducer.check_signals(SITES[reducer.method.site])
    except ValueError as error:
        return [f"A LLaVA cannot serve this: {error}."]
    return []


def _runs(counts: Sequence[int]) -> list[str]:
    lines = []
    for count, run_of in groupby(enumerate(counts[:-1]), key=lambda pair: pair[1]):
        layers = [layer for layer, _ in run_of]
        name = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        lines.append(f"  {name:<14}{count:>8}")
    return [*lines, f"  {'leaving':<14}{counts[-1]:>8}"]
