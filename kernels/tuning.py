"""Tile sizes of the kernels: defaults that need no tuning, and measured ones where a file has them.

Nothing is tuned while serving: `Config`s come from this table, or from the file that
`python -m ficoco_vllm.benchmarks.kernels.tune` writes on the serving machine.
"""

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Config(NamedTuple):
    """Launch configuration of one kernel.

    Attributes:
        tiles: name of each tile argument to its size, powers of two.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over a loop's loads.
    """

    tiles: Mapping[str, int]
    num_warps: int
    num_stages: int

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a launch.

        Fused multiply-adds are set explicitly: Triton is about to change its default.
        """
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return {**self.tiles, **options}


CANDIDATES: Mapping[str, tuple[Config, ...]] = {
    "attention_block": (
        Config({"BLOCK_R": 16, "BLOCK_K": 64}, 4, 3),
        Config({"BLOCK_R": 32, "BLOCK_K": 64}, 4, 3),
        Config({"BLOCK_R": 64, "BLOCK_K": 64}, 4, 3),
        Config({"BLOCK_R": 16, "BLOCK_K": 32}, 8, 2),
        Config({"BLOCK_R": 64, "BLOCK_K": 128}, 8, 3),
        # Where a second stage of loads would spill registers.
        Config({"BLOCK_R": 16, "BLOCK_K": 32}, 8, 1),
    ),
    "softmax_stats": (
        Config({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3),
        Config({"BLOCK_M": 64, "BLOCK_N": 16}, 4, 2),
        Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
    ),
    "attention_sums": (
        Config({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3),
        Config({"BLOCK_M": 64, "BLOCK_N": 16}, 4, 2),
        Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
    ),
    "cls_scores": (
        Config({"BLOCK_N": 16, "BLOCK_H": 4}, 4, 2),
        Config({"BLOCK_N": 16, "BLOCK_H": 2}, 8, 2),
    ),
    "filter_scores": (
        Config({"BLOCK_N": 32, "BLOCK_J": 32}, 4, 2),
        Config({"BLOCK_N": 64, "BLOCK_J": 32}, 4, 2),
    ),
    "row_statistics": (Config({"TILE": 2048}, 4, 1), Config({"TILE": 4096}, 8, 1)),
    "merge": (
        Config({"BLOCK_K": 32, "BLOCK_D": 64, "BLOCK_R": 32}, 4, 2),
        Config({"BLOCK_K": 64, "BLOCK_D": 64, "BLOCK_R": 32}, 4, 2),
        Config({"BLOCK_K": 32, "BLOCK_D": 64, "BLOCK_R": 16}, 8, 2),
        Config({"BLOCK_K": 64, "BLOCK_D": 128, "BLOCK_R": 32}, 8, 2),
        Config({"BLOCK_K": 32, "BLOCK_D": 128, "BLOCK_R": 32}, 4, 3),
    ),
    "partition": (Config({}, 8, 1), Config({}, 4, 1)),
    "farthest_points": (Config({}, 4, 1), Config({}, 8, 1)),
}


def config(op: str, device: torch.device, default: int = 0) -> Config:
    """The launch configuration of a kernel.

    Args:
        op: a key of `CANDIDATES`.
        device: where the kernel runs.
        default: index of the candidate without a measurement; it also names the class of shapes.

    Returns:
        The fastest measured configuration for this class on this kind of device, or the default.
    """
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return CANDIDATES[op][_measured().get(kind, {}).get(f"{op}/{default}", default)]


def measured_path() -> Path:
    """The file of measured configurations: device name -> "op/default" -> index into `CANDIDATES[op]`."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_home / "ficoco-vllm" / "kernels.json"


@cache
def _measured() -> dict[str, dict[str, int]]:
    path = measured_path()
    if not path.is_file():
        return {}
    measured: dict[str, dict[str, int]] = json.loads(path.read_text())
    return measured
