"""A real Prometheus in a process of its own, and Grafana's variables filled in."""

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from ficoco_vllm.benchmarks.metrics.prometheus import DASHBOARD, ROOT, Labels, Prometheus, filled_in, scrape
from ficoco_vllm.benchmarks.metrics.prometheus import panels as all_panels

__all__ = ["DASHBOARD", "ROOT", "Labels", "Prometheus", "filled_in", "scrape"]
MISSING = "the dashboard's tests: no prometheus or promtool (Debian's package prometheus)"

needs_prometheus = pytest.mark.needs(bool(shutil.which("prometheus") and shutil.which("promtool")), MISSING)


# The row, and the alerts, of a server with a target agreement.
QUALITY_ROW = "Quality"
QUALITY_ALERTS = {"FicocoTargetMissed", "FicocoTargetUnwatched"}


def panels(row: str | None = None) -> dict[str, list[str]]:
    """Title of each panel of the dashboard, or of one row, to its queries."""
    found, current = {}, ""
    for panel in all_panels():
        if panel["type"] == "row":
            current = panel["title"]
        elif row in (None, current):
            found[panel["title"]] = [target["expr"] for target in panel["targets"]]
    return found


def without_limit(rule: dict[str, Any]) -> str:
    """What an alert compares with its limit."""
    return re.sub(r" (?:[<>]=?|==) [0-9.]+", "", rule["expr"])


def rules() -> list[dict[str, Any]]:
    """The alerts."""
    file = ROOT / "docker" / "prometheus" / "rules" / "ficoco.yml"
    return [rule for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def promtool(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run promtool in the repository's root."""
    return subprocess.run(
        ["promtool", *arguments],
        input=text,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )
