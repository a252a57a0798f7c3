"""A real Prometheus in a process of its own, and Grafana's variables filled in."""

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ficoco_vllm.server.lifecycle.process import free_port, running

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "ficoco.json"
MISSING = "the dashboard's tests: no prometheus or promtool (Debian's package prometheus)"

needs_prometheus = pytest.mark.needs(bool(shutil.which("prometheus") and shutil.which("promtool")), MISSING)

Labels = tuple[tuple[str, str], ...]


@dataclass
class Prometheus:
    """Where it listens."""

    port: int

    def query(self, expression: str) -> dict[Labels, float]:
        """Evaluate now.

        Returns:
            Labels of each series, sorted, to its value.
        """
        url = f"http://127.0.0.1:{self.port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(url, timeout=30) as answer:
            result = json.load(answer)["data"]["result"]
        return {tuple(sorted(row["metric"].items())): float(row["value"][1]) for row in result}

    def is_ready(self) -> bool:
        """Whether it has scraped its target."""
        try:
            return self.query("up") != {} and all(self.query("up").values())
        except OSError:
            return False

    def wait_for_scrapes(self, count: int = 2) -> None:
        """Wait until whatever has happened so far was scraped, with samples behind it."""
        time.sleep(count * 1.0 + 0.5)


@contextmanager
def scrape(folder: Path, target: str) -> Iterator[Prometheus]:
    """Scrape a target every second until the block ends.

    Args:
        folder: for its data.
        target: host and port.
    """
    port = free_port()
    settings = folder / "prometheus.yml"
    job = {"job_name": "server", "static_configs": [{"targets": [target]}]}
    settings.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}))
    command = ["prometheus", f"--config.file={settings}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    found = Prometheus(port)
    with running(command, folder / "log", found.is_ready):
        yield found


def panels() -> dict[str, list[str]]:
    """Title of each panel of the dashboard to its queries."""
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return {
        panel["title"]: [target["expr"] for target in panel["targets"]]
        for panel in dashboard["panels"]
        if panel["type"] != "row"
    }


def filled_in(expression: str, window_seconds: int, model: str = ".*") -> str:
    """A query of the dashboard with Grafana's variables replaced."""
    return expression.replace("$__rate_interval", f"{window_seconds}s").replace("$model", model)


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
