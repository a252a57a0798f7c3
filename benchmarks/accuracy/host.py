"""The server that answers: a running one, or one started for the questions."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.accuracy.client import Endpoint
from ficoco_vllm.benchmarks.accuracy.variant_package import write_package
from ficoco_vllm.benchmarks.accuracy.variants import HOST_METHOD, Site, Variant
from ficoco_vllm.benchmarks.harness.http import served_model
from ficoco_vllm.benchmarks.harness.serving import serving

CONCURRENCY = 16


@dataclass(frozen=True)
class Host:
    """A server.

    Attributes:
        url: of a running server without a path, or None: servers are started, one for each site.
        model: folder or name of the model to serve, or None: the demo model.
        num_tokens: visual tokens of an image without reduction.
        arguments: more options for servers that are started.
    """

    url: str | None = None
    model: str | None = None
    api_key: str = "none"
    num_tokens: int = 576
    arguments: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for answers of two runs to be mixed."""
        return {"model": self.model or "demo", "num_tokens": self.num_tokens}


@contextmanager
def endpoint(host: Host, site: Site, variants: Sequence[Variant], **changes: Any) -> Iterator[Endpoint]:
    """A server that can answer as the variants of one site.

    Args:
        host: which server.
        site: where the variants reduce.
        variants: a server that is started offers those with settings of their own as methods.
        **changes: fields of `Endpoint` other than its defaults.

    Raises:
        RuntimeError: the server does not start.
    """
    fields = {"num_tokens": host.num_tokens, "api_key": host.api_key, **changes}
    if host.url is not None:
        yield Endpoint(host.url, served_model(host.url, host.api_key), **fields)
        return
    with tempfile.TemporaryDirectory(prefix="ficoco-bench-") as name:
        folder = Path(name)
        variables = write_package(folder, variants)
        arguments = [*filter(None, [host.model]), "--ficoco-method", HOST_METHOD[site]]
        arguments += ["--api-key", host.api_key, *host.arguments]
        with serving(arguments, folder / "server.log", variables) as server:
            yield Endpoint(server.url, served_model(server.url, host.api_key), **fields)
