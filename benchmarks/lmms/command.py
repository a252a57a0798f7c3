"""One benchmark: a server, lmms-eval in its own environment, one line of result."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.accuracy.probe import probe
from ficoco_vllm.benchmarks.harness.http import served_model
from ficoco_vllm.benchmarks.harness.results import environment
from ficoco_vllm.benchmarks.harness.serving import serving
from ficoco_vllm.benchmarks.lmms.benchmarks import Benchmark, paper_figure
from ficoco_vllm.benchmarks.lmms.tasks import write_task

PYTHON = Path(".venv-lmms/bin/python")
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Run:
    """What is run.

    Attributes:
        python: of an environment with lmms-eval (`make lmms`).
        url: of a running server, or None: one is started.
        model: to serve, or None: the demo model.
        method: None serves all visual tokens.
        keep: visual tokens that are left.
        limit: only the first questions, or None for all.
        serve_arguments: more options of the server that is started.
    """

    name: str
    benchmark: Benchmark
    python: Path = PYTHON
    url: str | None = None
    model: str | None = None
    method: str | None = None
    keep: int | None = None
    api_key: str = "none"
    concurrency: int = 16
    limit: int | None = None
    serve_arguments: tuple[str, ...] = ()


def evaluate(run: Run) -> dict[str, Any]:
    """Run one benchmark.

    Returns:
        The result as it is written to JSON.

    Raises:
        ValueError: there is no lmms-eval where it should be.
        RuntimeError: the server or lmms-eval fails, the server does not reduce as said, or a question went unanswered.
        openai.APIError: the server does not answer.
    """
    # Not resolved: a virtual environment's python is a link, and its own path determines the environment.
    python = Path(os.path.abspath(run.python))
    if not python.is_file():
        raise ValueError(f"--lmms-python = {str(run.python)!r} does not exist; `make lmms` makes it")
    if run.url is not None:
        return _evaluate(run, python, run.url)
    arguments = [*filter(None, [run.model]), "--api-key", run.api_key, *run.serve_arguments]
    if run.method is not None:
        arguments += ["--ficoco-method", run.method]
    if run.keep is not None:
        arguments += ["--ficoco-keep", str(run.keep)]
    with (
        tempfile.TemporaryDirectory(prefix="ficoco-lmms-") as name,
        serving(arguments, Path(name) / "log") as server,
    ):
        return _evaluate(run, python, server.url)


def _evaluate(run: Run, python: Path, url: str) -> dict[str, Any]:
    benchmark = run.benchmark
    wrong = probe(url, run.api_key, run.method, run.keep)
    if wrong:
        raise RuntimeError(f"{url} does not serve the requested setting: {'; '.join(wrong)}")
    with tempfile.TemporaryDirectory(prefix="ficoco-lmms-") as name:
        folder = Path(name)
        original = Path(benchmark.file)
        if not original.is_absolute():
            original = tasks_folder(python) / original
        task = write_task(folder / "tasks", original, benchmark.task, benchmark.pad, benchmark.specific)
        model = [
            f"model={served_model(url, run.api_key)}",
            f"base_url={url}/v1",
            f"num_concurrent={run.concurrency}",
            f"timeout={TIMEOUT_SECONDS}",
        ]
        command = [str(python), "-m", "lmms_eval", "eval", "--model", "openai"]
        command += ["--model_args", ",".join(model)]
        command += ["--tasks", task, "--include_path", str(folder / "tasks"), "--batch_size", "1"]
        command += ["--output_path", str(folder / "out"), "--log_samples"]
        command += [] if run.limit is None else ["--limit", str(run.limit)]
        variables = {**os.environ, "OPENAI_API_KEY": run.api_key}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        figures = _result(folder / "out")
        if done.returncode or figures is None:
            raise RuntimeError(
                f"lmms-eval failed: {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            )
        failed = sum(text.count("[LMMS_EVAL_REQUEST_FAILED") for text in _samples(folder / "out"))
    if failed:
        # lmms-eval counts them as wrong answers, which would look like a loss of accuracy.
        raise RuntimeError(f"{failed} questions were not answered; the last lines:\n{done.stderr[-4000:]}")
    measured = _metric(figures["results"][task], benchmark.metric)
    return {
        "schema": 1,
        "benchmark": run.name,
        "task": benchmark.task,
        "metric": benchmark.metric,
        "model": run.model or "demo",
        "method": run.method,
        "keep": run.keep,
        "count": figures["n-samples"][task]["effective"],
        "measured": round(measured * benchmark.scale, 2),
        "paper": paper_figure(run.name, run.method, run.keep),
        "note": benchmark.note,
        "environment": environment(),
        "lmms_eval": figures.get("lmms_eval_version") or _version(python),
    }


def tasks_folder(python: Path) -> Path:
    """Where an environment's lmms-eval keeps its tasks.

    Raises:
        RuntimeError: the environment has none.
    """
    code = "import importlib.util; print(importlib.util.find_spec('lmms_eval').submodule_search_locations[0])"
    return Path(_output(python, code)) / "tasks"


def _version(python: Path) -> str:
    return _output(python, "from importlib.metadata import version; print(version('lmms_eval'))")


def _output(python: Path, code: str) -> str:
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{python} has no lmms-eval: {done.stderr[-500:]}")
    return done.stdout.strip().splitlines()[-1]


def _result(folder: Path) -> dict[str, Any] | None:
    files = sorted(folder.rglob("*results.json"))
    return json.loads(files[-1].read_text(encoding="utf-8")) if files else None


def _samples(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in folder.rglob("*samples*.jsonl")]


def _metric(figures: Mapping[str, Any], name: str) -> float:
    for key, value in figures.items():
        if key.partition(",")[0] == name:
            return float(value)
    raise RuntimeError(f"metric = {name!r} is not in lmms-eval's result: {', '.join(figures)}")
