"""Which patches a server kept of an image, told by its explanations (docs/explain.md)."""

import base64
import json
import urllib.error
import urllib.request
from typing import Any

from ficoco_vllm.benchmarks.accuracy.client import Endpoint
from ficoco_vllm.benchmarks.accuracy.variants import Variant
from ficoco_vllm.benchmarks.accuracy.workload import Item

# Options of a server that shall explain; its answers are few, and nobody else asks.
EXPLAINS = ("--ficoco-explain", "--ficoco-explain-rate", "0")
_SECONDS = 600


def kept_patches(endpoint: Endpoint, variant: Variant, item: Item) -> dict[str, Any] | None:
    """Ask once more, traced.

    Args:
        endpoint: the server.
        variant: a method with its budget.
        item: the question.

    Returns:
        `answer`, `grid` (rows, columns), `central_square` (see `Explanation`) and `kept`, the indices of the patches
        that are left behind the last reduction; None where the server does not explain, or not now.
    """
    assert item.image is not None
    url = f"data:{item.media_type};base64,{base64.b64encode(item.image).decode()}"
    body = {"image": url, "question": item.question, "max_tokens": endpoint.max_tokens, "compare": False}
    asked = {"method": variant.served_name, "keep": variant.keep}
    request = urllib.request.Request(
        f"{endpoint.url}/ficoco/explain",
        json.dumps(body | asked).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {endpoint.api_key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            told = json.load(answer)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return None
    rows, columns = told["grid"]
    last = told["layers"][-1]["kept"] if told["layers"] else list(range(rows * columns))
    return {
        "answer": told["reduced"]["answer"].strip(),
        "grid": [rows, columns],
        "central_square": told["central_square"],
        "kept": sorted(token for token in last if token < rows * columns),
    }
