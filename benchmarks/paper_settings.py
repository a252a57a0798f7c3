"""The settings for each of the paper's FLOPs points: fills the generated block of docs/paper-settings.md.

python -m ficoco_vllm.benchmarks.paper_settings            # rewrite the block
python -m ficoco_vllm.benchmarks.paper_settings --check    # exit code 1 if it is not current
"""

import json
import sys
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
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


@dataclass(frozen=True)
class Setting:
    """Settings of a server, with their cost.

    Attributes:
        config: settings of the server, with `keep`.
    """

    config: dict[str, Any]

    @cached_property
    def plan(self) -> TokenPlan:
        """Tokens layer by layer, as they are served.

        Raises:
            ValueError: the settings cannot be served.
        """
        return ServerPlan.for_model(FicocoConfig.parse(self.config), SHAPE).image_tokens()

    @property
    def tera_flops(self) -> float:
        """FLOPs of the language model's prefill, as the paper counts them, in 10^12."""
        return self._cost.decoder_flops / 1e12

    @property
    def kv_megabytes(self) -> float:
        """KV cache in fp16, decimal megabytes."""
        return self._cost.kv_bytes / 1e6

    @cached_property
    def _cost(self) -> Estimate:
        return estimate(SHAPE, self.plan, num_text_tokens=NUM_TEXT_TOKENS)


def nearest(method: dict[str, Any], point: float) -> Setting | None:
    """The budget whose FLOPs come nearest to a point, or None where no budget comes within 5% of it."""
    keeps = range(1, SHAPE.tower.num_patches + 1)
    above = bisect_left(keeps, point, key=lambda keep: Setting({**method, "keep": keep}).tera_flops)
    around = {keeps[max(0, above - 1)], keeps[min(above, len(keeps) - 1)]}
    settings = [Setting({**method, "keep": keep}) for keep in sorted(around)]
    best = min(settings, key=lambda setting: abs(setting.tera_flops - point))
    return best if abs(best.tera_flops - point) <= 0.05 * point else None


def settings_table() -> list[str]:
    """Every point, every method."""
    rows = []
    for point in POINTS:
        for method in METHODS:
            setting = nearest(method, point)
            cells = [point, f"`{method['method']}`", method.get("schedule", "even, tower's layers 12 to 23")]
            if setting is None:
                least = Setting({**method, "keep": 1}).tera_flops
                rows.append([*cells, f"none: at least {least:.2f} TFLOPs", "", "", ""])
                continue
            cells += [f"`{json.dumps(setting.config)}`", _runs(setting.plan.decoder[:-1])]
            rows.append([*cells, f"{setting.tera_flops:.2f}", f"{setting.kv_megabytes:.0f}"])
    layers = "layers of the decoder x visual tokens"
    return table(("TFLOPs", "method", "schedule", "settings", layers, "TFLOPs, ours", "KV MB"), rows)


def _runs(counts: Iterable[int]) -> str:
    runs = [(count, len(list(same))) for count, same in groupby(counts)]
    return ", ".join(str(count) if len(runs) == 1 else f"{length} x {count}" for count, length in runs)


def main() -> int:
    """Write the page's block, or check it."""
    return write_pages(__doc__, lambda: {PAGE: fill(PAGE.read_text("utf-8"), {"settings": settings_table()})})


if __name__ == "__main__":
    sys.exit(main())
