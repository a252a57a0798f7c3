"""Output of `serve` until the server is ready: lines of progress, then one block."""

import argparse
import json
import os
import shlex
import socket
import ssl
import threading
import time

import psutil

from ficoco_vllm.demo_model import examples
from ficoco_vllm.environment import HEALTH_QUERY

_POLL_SECONDS = 0.25
# Interval between two lines of the same stage.
_REPEAT_SECONDS = 10.0
_ANSWER_SECONDS = 10.0
_NO_PAGE = "none; --ficoco-explain together with --ficoco-method adds one that shows what is kept"
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


class Progress:
    """Prints what a starting server does and since when, until its block.

    Seconds count from the start of the process.
    """

    def __init__(self) -> None:
        """Start a thread that repeats the current stage."""
        self._started: float = psutil.Process().create_time()
        self._stage = ""
        self._args: argparse.Namespace | None = None
        self._method = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ficoco-progress", daemon=True)
        self._thread.start()

    def stage(self, text: str) -> None:
        """Print a new stage."""
        self._stage = text
        self._print(text)

    def announce(self, args: argparse.Namespace, method: str) -> None:
        """Print the block once the server answers.

        Args:
            args: options, complete.
            method: method and budget in words.
        """
        self._method, self._args = method, args

    def end(self) -> None:
        """Stop printing."""
        self._ended.set()
        self._thread.join(_ANSWER_SECONDS)

    def _run(self) -> None:
        printed = time.monotonic()
        stage = ""
        while not self._ended.wait(_POLL_SECONDS):
            if self._args is not None and answers(self._args):
                print(f"\n{block(self._args, self._method, self._seconds)}\n", flush=True)
                return
            if stage != self._stage:
                stage, printed = self._stage, time.monotonic()
            elif time.monotonic() - printed >= _REPEAT_SECONDS:
                printed = time.monotonic()
                self._print(f"still {stage}")

    @property
    def _seconds(self) -> float:
        return time.time() - self._started

    def _print(self, text: str) -> None:
        print(f"ficoco-vllm: {self._seconds:5.1f} s  {text}", flush=True)


def answers(args: argparse.Namespace) -> bool:
    """Whether `/health` of the server answers 200.

    Args:
        args: options of the server.
    """
    request = f"GET /health?{HEALTH_QUERY} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    try:
        with _connect(args) as connection:
            connection.sendall(request.encode())
            return b" 200 " in connection.recv(64)
    except ssl.SSLError:  # the server requires client certificates, so it is running
        return True
    except OSError:
        return False


def _connect(args: argparse.Namespace) -> socket.socket:
    if args.uds:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_ANSWER_SECONDS)
        connection.connect(args.uds)
    else:
        host = args.host or ""
        connection = socket.create_connection((_EVERYWHERE.get(host, host), args.port), _ANSWER_SECONDS)
    if not args.ssl_certfile:
        return connection
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(connection)


def block(args: argparse.Namespace, method: str, seconds: float) -> str:
    """The lines that report a ready server.

    Args:
        args: options of the server.
        method: method and budget in words.
        seconds: duration of the start.
    """
    host = args.host or ""
    name = "localhost" if host in _EVERYWHERE else f"[{host}]" if ":" in host else host
    url = f"{'https' if args.ssl_certfile else 'http'}://{name}:{args.port}"
    if args.uds:
        url = "http://localhost"
    served = (args.served_model_name or [args.model])[0]
    rows = [
        ("URL", f"{url}/v1" + (f" through the socket {args.uds}" if args.uds else "")),
        ("model", served if served == args.model else f"{served} ({args.model})"),
        ("method", method),
        ("page", f"{url}/ficoco/" if args.ficoco_explain else _NO_PAGE),
        ("metrics", f"{url}/metrics"),
        ("try", curl(args, url, served)),
    ]
    return "\n".join(
        [f"ficoco-vllm is ready after {seconds:.0f} s", *(f"  {title:<9}{text}" for title, text in rows)]
    )


def curl(args: argparse.Namespace, url: str, served: str) -> str:
    """A command line that sends an image of the package to the server.

    Args:
        args: options of the server.
        url: base URL.
        served: name of the model.
    """
    example = next(item for item in examples() if "number" in item.question)
    image, text = (json.dumps(value) for value in ("@", example.question))
    image = image.replace("@", "data:image/png;base64,@")
    content = f'{{"type": "image_url", "image_url": {{"url": {image}}}}}, {{"type": "text", "text": {text}}}'
    message = f'{{"role": "user", "content": [{content}]}}'
    body = shlex.quote(f'{{"model": {json.dumps(served)}, "max_tokens": 64, "messages": [{message}]}}')
    options = [f"--unix-socket {shlex.quote(args.uds)}"] if args.uds else []
    if args.api_key or os.environ.get("VLLM_API_KEY"):
        options.append('-H "Authorization: Bearer $VLLM_API_KEY"')
    options.append("-H 'Content-Type: application/json'")
    encoded = f"'\"$(base64 -w0 {shlex.quote(str(example.image))})\"'"
    return f"curl -s {url}/v1/chat/completions {' '.join(options)} -d {body.replace('@', encoded)}"
