"""The settings for each of the paper's FLOPs points: fills the generated block of docs/paper-settings.md.

python -m ficoco_vllm.benchmarks.paper_settings            # rewrite the block
python -m ficoco_vllm.benchmarks.paper_settings --check    # exit code 1 if it is not current
"""

import json
import sys
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import groupby, product
from typing import Any

from ficoco_vllm.benchmarks.harness.pages import ROOT, fill, table, write_pages
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.reduction.cost import KNOWN_MODELS, Estimate, TokenPlan, estimate, model_shape

PAGE = ROOT / "docs" / "paper-settings.md"
SHAPE = model_shape(KNOWN_MODELS["llava-hf/llava-1.5-7b-hf"])
NUM_TEXT_TOKENS = 60  # the paper's, Sec. 11.3
# TFLOPs of Table 3.
POINTS = (4.2, 3.3, 2.4, 1.5)
METHODS: tuple[dict[str, Any], ...] = (
    {"method": "ficoco-v"},
    {"method": "ficoco-l", "schedule": "one-shot"},
    {"method": "ficoco-l", "schedule": "geometric"},
    {"method": "ficoco-l", "schedule": "even"},
    {"method": "ficoco-vl", "schedule": "one-shot"},
    {"method": "ficoco-vl", "schedule": "even"},
)


def cost(config: Mapping[str, Any]) -> tuple[TokenPlan, Estimate]:
    """Tokens layer by layer, as they are served with settings that name `keep`, and what they cost.

    Raises:
        ValueError: the settings cannot be served.
    """
    plan = ServerPlan.for_model(FicocoConfig.parse(config), SHAPE).image_tokens()
    return plan, estimate(SHAPE, plan, num_text_tokens=NUM_TEXT_TOKENS)


def tera_flops(config: Mapping[str, Any]) -> float:
    """FLOPs of the language model's prefill, as the paper counts them, in 10^12."""
    return cost(config)[1].decoder_flops / 1e12


def nearest(method: dict[str, Any], point: float) -> dict[str, Any] | None:
    """The settings whose FLOPs come nearest to a point, or None where no budget comes within 5% of it."""
    settings = [{**method, "keep": keep} for keep in range(1, SHAPE.tower.num_patches + 1)]
    above = bisect_left(settings, point, key=tera_flops)
    around = settings[max(0, above - 1) : above + 1]
    best = min(around, key=lambda config: abs(tera_flops(config) - point))
    return best if abs(tera_flops(best) - point) <= 0.05 * point else None


def settings_table() -> list[str]:
    """Every point, every method."""
    rows = []
    for point, method in product(POINTS, METHODS):
        cells = [point, f"`{method['method']}`", method.get("schedule", "even, tower's layers 12 to 23")]
        config = nearest(method, point)
        if config is None:
            cells += [f"none: at least {tera_flops({**method, 'keep': 1}):.2f} TFLOPs", "", "", ""]
        else:
            plan, estimated = cost(config)
            cells += [f"`{json.dumps(config)}`", _runs(plan.decoder[:-1]), f"{tera_flops(config):.2f}"]
            cells.append(f"{estimated.kv_bytes / 1e6:.0f}")
        rows.append(cells)
    layers = "layers of the decoder x visual tokens"
    return table(("TFLOPs", "method", "schedule", "settings", layers, "TFLOPs, ours", "KV MB"), rows)


def _runs(counts: Iterable[int]) -> str:
    runs = [(count, len(list(same))) for count, same in groupby(counts)]
    return ", ".join(str(count) if len(runs) == 1 else f"{length} x {count}" for count, length in runs)


def page() -> str:
    """The page with its block."""
    return fill(PAGE.read_text("utf-8"), {"settings": settings_table()})


if __name__ == "__main__":
    sys.exit(write_pages(__doc__, lambda: {PAGE: page()}))
