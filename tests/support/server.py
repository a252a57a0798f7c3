"""A real server in a process of its own, started through the command line."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from ficoco_vllm.benchmarks.harness.http import data_url, message, metric
from ficoco_vllm.benchmarks.harness.serving import OURS, Process, is_healthy, serving
from ficoco_vllm.environment import ALLOW_PRIVATE_MEDIA, MAX_BODY_BYTES, MAX_IMAGE_BYTES, MAX_PIXELS

__all__ = ["data_url", "message"]

# What servers compute in, the demo model's default on a CPU; bytes of a value.
DTYPE, VALUE_BYTES = "float32", 4
# Budget of the server that the tests share; that of `make serve`.
DEMO_KEEP = 64
# Also what the README's client sends.
API_KEY = "none"
DEMO_ARGUMENTS = [
    *("--ficoco-method", "ficoco-v", "--ficoco-keep", str(DEMO_KEEP), "--trust-request-mm-kwargs"),
    *("--api-key", API_KEY, "--ficoco-explain", "--ficoco-explain-rate", "0"),
]
# What conftest.py sets for engines inside the test process, and what the command line leaves in the tests that
# call it there.
ONLY_IN_PROCESS = (
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_LOGGING_LEVEL",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_DIST_IDENT",  # vLLM sets it in a process with an engine
    "VLLM_MEDIA_CONNECTOR",
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS",
    MAX_PIXELS,
    MAX_IMAGE_BYTES,
    MAX_BODY_BYTES,
    ALLOW_PRIVATE_MEDIA,
)


@dataclass
class Server:
    """Address and output of the server."""

    port: int
    log: Path
    process: Process

    @property
    def url(self) -> str:
        """Without a path."""
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> OpenAI:
        """The official client."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, max_retries=0, timeout=120)

    def metric(self, name: str) -> float:
        """Sum of one Prometheus metric over its labels."""
        return metric(self.url, name)

    def is_healthy(self) -> bool:
        """Whether /health answers 200."""
        return is_healthy(self.url)


@contextmanager
def serve(
    log: Path,
    *arguments: str,
    program: Sequence[str] = OURS,
    python: Path = Path(sys.executable),
    folder: Path | None = None,
    verbose: bool = True,
    **environment: str,
) -> Iterator[Server]:
    """Run a server until the block ends; only this process and its children are stopped.

    Args:
        log: takes what it prints.
        arguments: of the program.
        program: words after `python` that start the server.
        python: which one runs it; its `ficoco_vllm` is the one that serves.
        folder: working directory; None means that of the tests.
        verbose: whether our own server logs all that vLLM says while it starts.
        environment: variables beside those of this process.
    """
    variables = {**dict.fromkeys(ONLY_IN_PROCESS), **environment}
    if program == OURS and verbose:
        arguments += ("--verbose",)
    with serving(arguments, log, variables, program, python, folder) as served:
        yield Server(served.port, log, served.process)


def budget(keep: int | None) -> dict[str, Any]:
    """`extra_body` of a request with a budget of its own."""
    return {} if keep is None else {"mm_processor_kwargs": {"ficoco_keep": keep}}


def options_of_serve() -> set[str]:
    """All options of `ficoco-vllm serve`: vLLM's and ours."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from ficoco_vllm.compat.versions import make_arg_parser
    from ficoco_vllm.server.commands.serve_options import add_arguments

    parser = make_arg_parser(FlexibleArgumentParser())
    add_arguments(parser)
    return set(parser._option_string_actions)
