"""One benchmark: a server, lmms-eval in its own environment, one line of result; and the table of all results."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.accuracy.client import Host, endpoint
from ficoco_vllm.benchmarks.accuracy.probe import probe
from ficoco_vllm.benchmarks.harness.pages import table as markdown_table
from ficoco_vllm.benchmarks.harness.results import environment
from ficoco_vllm.benchmarks.lmms.benchmarks import BENCHMARKS, Benchmark, paper_figure
from ficoco_vllm.benchmarks.lmms.tasks import write_task

PYTHON = Path(".venv-lmms/bin/python")
TIMEOUT_SECONDS = 600
_HEAD = ("benchmark", "model", "method", "tokens", "questions", "measured", "the paper", "note")


def evaluate(
    name: str,
    benchmark: Benchmark,
    python: Path = PYTHON,
    *,
    url: str | None = None,
    model: str | None = None,
    method: str | None = None,
    keep: int | None = None,
    api_key: str = "none",
    concurrency: int = 16,
    limit: int | None = None,
) -> dict[str, Any]:
    """The result of one benchmark as it is written to JSON, with `python` of an environment with lmms-eval.

    Without a URL a server is started; without a model it serves the demo model, without a method all visual tokens.
    `limit` takes only the first questions.

    Raises:
        ValueError: there is no lmms-eval where it should be.
        RuntimeError: the server or lmms-eval fails, the server does not reduce as requested, or an answer is missing.
        openai.APIError: the server does not answer.
    """
    if not python.is_file():
        raise ValueError(f"--lmms-python = {str(python)!r} does not exist; `make lmms` makes it")
    # Not resolved: a virtual environment's python is a link, and its own path determines the environment.
    python = python.absolute()
    host = Host(url, model, api_key, arguments=() if keep is None else ("--ficoco-keep", str(keep)))
    with tempfile.TemporaryDirectory(prefix="ficoco-lmms-") as made, endpoint(host, method, []) as server:
        folder = Path(made)
        if wrong := probe(server.url, api_key, method, keep):
            raise RuntimeError(f"{server.url} does not serve the requested setting: {'; '.join(wrong)}")
        original = tasks_folder(python) / benchmark.file
        task = write_task(folder / "tasks", original, benchmark.task, benchmark.pad, benchmark.specific)
        client = {
            "model": server.model,
            "base_url": f"{server.url}/v1",
            "num_concurrent": concurrency,
            "timeout": TIMEOUT_SECONDS,
        }
        command = [str(python), "-m", "lmms_eval", "eval", "--model", "openai"]
        command += ["--model_args", ",".join(f"{key}={value}" for key, value in client.items())]
        command += ["--tasks", task, "--include_path", str(folder / "tasks"), "--batch_size", "1"]
        command += [] if limit is None else ["--limit", str(limit)]
        figures = _run(command, folder / "out", api_key)
    return {
        "schema": 1,
        "benchmark": name,
        "task": benchmark.task,
        "metric": benchmark.metric,
        "model": model or "demo",
        "method": method,
        "keep": keep,
        "count": figures["n-samples"][task]["effective"],
        "measured": round(_metric(figures["results"][task], benchmark.metric) * benchmark.scale, 2),
        "paper": paper_figure(name, method, keep),
        "note": benchmark.note,
        "environment": environment(),
        "lmms_eval": _output(python, "from importlib.metadata import version; print(version('lmms_eval'))"),
    }


def _run(command: list[str], out: Path, api_key: str) -> dict[str, Any]:
    """Result of the one task that lmms-eval runs; every question must be answered."""
    command = [*command, "--output_path", str(out), "--log_samples"]
    variables = {**os.environ, "OPENAI_API_KEY": api_key}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    written = sorted(out.rglob("*results.json"))
    if done.returncode or not written:
        output = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        raise RuntimeError(f"lmms-eval failed: {' '.join(command)}\n{output}")
    samples = [path.read_text(encoding="utf-8") for path in out.rglob("*samples*.jsonl")]
    failed = sum(text.count("[LMMS_EVAL_REQUEST_FAILED") for text in samples)
    if failed:
        # lmms-eval counts them as wrong answers, which would look like a loss of accuracy.
        raise RuntimeError(f"{failed} questions were not answered; the last lines:\n{done.stderr[-4000:]}")
    return dict(json.loads(written[-1].read_text(encoding="utf-8")))


def tasks_folder(python: Path) -> Path:
    """Folder with the tasks of an environment's lmms-eval."""
    code = "import importlib.util; print(importlib.util.find_spec('lmms_eval').submodule_search_locations[0])"
    return Path(_output(python, code)) / "tasks"


def _output(python: Path, code: str) -> str:
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{python} has no lmms-eval: {done.stderr[-500:]}")
    return done.stdout.strip().splitlines()[-1]


def _metric(figures: Mapping[str, Any], name: str) -> float:
    for key, value in figures.items():
        if key.partition(",")[0] == name:
            return float(value)
    raise RuntimeError(f"metric = {name!r} is not in lmms-eval's result: {', '.join(figures)}")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Results of a folder that `bench lmms` wrote into, in the order of the paper's columns."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(rows, key=lambda row: [*BENCHMARKS, row["benchmark"]].index(row["benchmark"]))


def table(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each run: what was measured, what the paper prints."""
    lines = []
    for row in results:
        title = BENCHMARKS[row["benchmark"]].title if row["benchmark"] in BENCHMARKS else row["benchmark"]
        paper = "" if row["paper"] is None else f"{row['paper']:.1f}"
        cells = [title, Path(row["model"]).name, row["method"] or "none", row["keep"] or "all", row["count"]]
        lines.append([*cells, f"{row['measured']:.1f}", paper, row["note"]])
    return markdown_table(_HEAD, lines)
