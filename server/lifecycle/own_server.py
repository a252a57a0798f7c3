"""A server for one picture: on this machine only, behind a key of its own, gone afterwards."""

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ficoco_vllm.server.lifecycle.process import StartError, serving

DEFAULT_METHOD = "ficoco-v"


@contextmanager
def own_server(model: str | None, method: str | None, keep: int | None) -> Iterator[tuple[str, str]]:
    """Run `ficoco-vllm serve` until the block ends.

    Args:
        model: what it serves; None means the demo model.
        method: of the reduction.
        keep: its budget; None leaves it to the method.

    Yields:
        Its address and its API key.

    Raises:
        RuntimeError: it does not start; with what it said last.
    """
    arguments = [*([model] if model else []), "--ficoco-explain", "--ficoco-method", method or DEFAULT_METHOD]
    arguments += ["--ficoco-keep", str(keep)] if keep is not None else []
    key = secrets.token_urlsafe(16)  # in the environment, where other users of the machine cannot read it
    with tempfile.TemporaryDirectory(prefix="ficoco-explain-") as folder:
        log = Path(folder) / "log"
        try:
            with serving(arguments, log, {"VLLM_API_KEY": key}) as served:
                yield served.url, key
        except StartError as error:
            raise RuntimeError(_why(log)) from error


def _why(log: Path) -> str:
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    prefix = "ficoco-vllm: error: "
    error = next((line for line in reversed(said) if line.startswith(prefix)), None)
    if error is not None:
        return error.removeprefix(prefix)
    return "the server did not start:\n" + "\n".join(said[-20:])
