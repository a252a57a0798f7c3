"""A real Prometheus in a process of its own, and Grafana's dashboard with its variables replaced."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ficoco_vllm.benchmarks.harness.serving import free_port, running

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "ficoco.json"
Labels = tuple[tuple[str, str], ...]


@dataclass
class Prometheus:
    """A running Prometheus, by its port."""

    port: int

    def ask(self, path: str, **values: Any) -> list[dict[str, Any]]:
        """Result of a GET of `/api/v1/PATH`: a mapping for each series."""
        answer = httpx.get(f"http://127.0.0.1:{self.port}/api/v1/{path}", params=values, timeout=60)
        return list(answer.raise_for_status().json()["data"]["result"])

    def query(self, expression: str, at: float | None = None) -> dict[Labels, float]:
        """Evaluate now, or at a time in seconds since 1970: sorted labels of each series to its value."""
        result = self.ask("query", query=expression, time=at or time.time())
        return {tuple(sorted(row["metric"].items())): float(row["value"][1]) for row in result}

    def is_ready(self) -> bool:
        """Whether it has scraped its target."""
        try:
            targets = self.query("up")
        except httpx.HTTPError:
            return False
        return bool(targets) and all(targets.values())

    def wait_for_scrapes(self, count: int = 2, seconds: float = 60) -> None:
        """Wait until everything so far has been scraped; a busy machine may scrape late.

        Raises:
            TimeoutError: the target was not scraped that often.
        """
        last = start = time.time()
        while count:
            if time.time() > start + seconds:
                raise TimeoutError(f"{count} more scrapes did not come within {seconds:.0f} s")
            time.sleep(0.1)
            (begun,) = self.query("timestamp(up)").values()
            if begun > last and self.is_ready():
                last, count = begun, count - 1


@contextmanager
def scrape(folder: Path, target: str) -> Iterator[Prometheus]:
    """Scrape a target every second until the block ends."""
    prometheus, settings = Prometheus(free_port()), folder / "prometheus.yml"
    job = {"job_name": "server", "static_configs": [{"targets": [target]}]}
    settings.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}))
    command = ["prometheus", f"--config.file={settings}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{prometheus.port}", "--log.level=warn"]
    with running(command, folder / "log", prometheus.is_ready):
        yield prometheus


def panels() -> list[dict[str, Any]]:
    """Panels of the dashboard, as Grafana stores them."""
    return list(json.loads(DASHBOARD.read_text())["panels"])


def filled_in(expression: str, window_seconds: int, model: str = ".*", instance: str = ".*") -> str:
    """A query of the dashboard with Grafana's variables replaced."""
    variables = {"$__rate_interval": f"{window_seconds}s", "$model": model, "$instance": instance}
    for name, value in variables.items():
        expression = expression.replace(name, value)
    return expression
