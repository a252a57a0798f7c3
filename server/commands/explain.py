"""`ficoco-vllm explain`: a picture of the kept patches of an image, and of the destinations of the others."""

import argparse
import base64
import io
import json
import os
import secrets
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from pydantic import ValidationError

from ficoco_vllm.benchmarks.harness.serving import StartError, serving
from ficoco_vllm.server.commands.arguments import base_url, fail
from ficoco_vllm.server.explain.picture import draw
from ficoco_vllm.server.explain.schema import Explanation

ANSWER_SECONDS = 600
DEFAULT_METHOD = "ficoco-v"


class _CommandError(Exception):
    """Wrong input or a refusal, in one line for the user."""


def add_parser(subparsers: Any) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser(
        "explain",
        help="draw which patches of an image are kept, and where the others' information goes",
        description="Asks a question about an image with and without reduction, and draws the reduction. "
        "Uses a server that runs with --ficoco-explain, or starts one for this picture alone.",
    )
    add = parser.add_argument
    add("image", metavar="IMAGE", type=Path, help="an image file")
    add("question", metavar="QUESTION", help="a question about it")
    add("--out", metavar="FILE", type=Path, required=True, help="file of the picture (.png, .jpg, .webp)")
    add("--method", metavar="NAME", help="one of `ficoco-vllm methods` (default: the server's)")
    add("--keep", type=int, metavar="N", help="visual tokens kept (default: the server's)")
    add(
        "--patch",
        metavar="ROW,COLUMN",
        action="append",
        help="a removed patch whose path is drawn, counted from 1; repeatable (default: three)",
    )
    add("--max-tokens", type=int, default=64, metavar="N", help="limit of each answer (default: %(default)s)")
    add("--json", metavar="FILE", type=Path, help="also write the explanation as JSON")
    add("--url", type=base_url, metavar="URL", help="a running server, such as http://127.0.0.1:8000")
    add("--api-key", metavar="KEY", help="API key of that server (default: $VLLM_API_KEY)")
    add("--model", metavar="MODEL", help="model to serve without --url (default: the demo model)")


def run(args: argparse.Namespace) -> int:
    """Request an explanation and draw it.

    Returns:
        0; 2 if the input is wrong, 1 if no server answers (the reason goes to stderr).
    """
    try:
        picture, body = _prepare(args)
        if args.url is not None:
            key = args.api_key or os.environ.get("VLLM_API_KEY")
            explanation = _ask(args.url, key, body)
        else:
            print(
                "starting a server for this picture, about a minute (--url uses a running one)",
                file=sys.stderr,
            )
            with _own_server(args) as (url, key):
                explanation = _ask(url, key, body)
        draw(picture, explanation, _patches(args.patch, explanation.grid)).save(args.out)
        if args.json is not None:
            args.json.write_text(explanation.model_dump_json(indent=1), encoding="utf-8")
    except (_CommandError, ValueError, OSError) as error:
        return fail(str(error), 2)
    except RuntimeError as error:
        return fail(str(error), 1)
    print(_summary(explanation, args.out))
    return 0


@contextmanager
def _own_server(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Run a server on this machine for one picture.

    Yields:
        Its base URL and its API key.

    Raises:
        RuntimeError: it does not start; with its error, or the end of its log.
    """
    options = [*([args.model] if args.model else []), "--ficoco-explain"]
    options += ["--ficoco-method", args.method or DEFAULT_METHOD]
    options += ["--ficoco-keep", str(args.keep)] if args.keep is not None else []
    key = secrets.token_urlsafe(16)  # in the environment, where other users of the machine cannot read it
    with tempfile.TemporaryDirectory(prefix="ficoco-explain-") as folder:
        log = Path(folder) / "log"
        try:
            with serving(options, log, {"VLLM_API_KEY": key}) as served:
                yield served.url, key
        except StartError as error:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            prefix = "ficoco-vllm: error: "
            errors = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
            reason = errors[-1] if errors else "the server did not start:\n" + "\n".join(lines[-20:])
            raise RuntimeError(reason) from error


def _prepare(args: argparse.Namespace) -> tuple[Image.Image, dict[str, Any]]:
    """Read the image and build the body of the request."""
    if args.url is not None and args.model is not None:
        raise _CommandError("--model is allowed without --url only: a running server has its model")
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise _CommandError(
            f"--out = {str(args.out)!r} is not allowed; allowed: a name in .png, .jpg or .webp"
        )
    for path in filter(None, (args.out, args.json)):
        if not path.absolute().parent.is_dir():
            raise _CommandError(f"there is no folder {path.absolute().parent}")
    try:
        with Image.open(args.image) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _CommandError(f"{args.image} cannot be read as an image ({error})") from error
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    body = {
        "image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "question": args.question,
        "max_tokens": args.max_tokens,
    }
    body |= {name: getattr(args, name) for name in ("method", "keep") if getattr(args, name) is not None}
    return picture, body


def _ask(url: str, key: str | None, body: dict[str, Any]) -> Explanation:
    """`POST /ficoco/explain`."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise _CommandError(f"--url = {url!r} is not allowed; allowed: http://HOST:PORT or https://...")
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/ficoco/explain", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            return Explanation.model_validate_json(answer.read())
    except urllib.error.HTTPError as error:
        raise _CommandError(_reason(error, url)) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise RuntimeError(f"no answer from {url} ({getattr(error, 'reason', error)})") from error
    except ValidationError as error:
        raise RuntimeError(f"the response of {url} is not an explanation; is it ficoco-vllm?") from error


def _reason(error: urllib.error.HTTPError, url: str) -> str:
    """The server's error in one line."""
    if error.code == 404:
        return f"{url} serves no explanations; start it with --ficoco-explain"
    if error.code == 401:
        return f"{url} requires its API key: --api-key, or VLLM_API_KEY in the environment"
    try:
        message = json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = error.reason
    return f"{url} answered {error.code}: {' '.join(str(message).split())}"


def _patches(texts: list[str] | None, grid: tuple[int, int]) -> list[int] | None:
    if texts is None:
        return None
    patches = []
    for text in texts:
        row, _, column = text.partition(",")
        if not (
            row.isdigit() and column.isdigit() and 1 <= int(row) <= grid[0] and 1 <= int(column) <= grid[1]
        ):
            allowed = f"ROW,COLUMN from 1,1 to {grid[0]},{grid[1]}"
            raise _CommandError(f"--patch = {text!r} is not allowed; allowed: {allowed}")
        patches.append((int(row) - 1) * grid[1] + int(column) - 1)
    return patches


def _summary(explanation: Explanation, out: Path) -> str:
    sides = [(f"{explanation.method}, {explanation.keep} kept", explanation.reduced)]
    if explanation.full is not None:
        sides.insert(0, ("without reduction", explanation.full))
    lines = [
        f"{title}: {side.answer.strip()} ({side.visual_tokens} visual tokens, first token after "
        f"{side.ttft_seconds:.2f} s, KV cache of the prompt {side.kv_bytes / 1e6:.2f} MB)"
        for title, side in sides
    ]
    return "\n".join([*lines, f"drawn: {out}"])
