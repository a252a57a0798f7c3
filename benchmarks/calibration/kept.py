"""The patches of an image that a server kept, from its explanations (docs/explain.md)."""

from typing import Any

import httpx

from ficoco_vllm.benchmarks.accuracy.client import Endpoint
from ficoco_vllm.benchmarks.accuracy.variants import Variant
from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.harness.http import data_url

# Options of a server that explains; its only client asks few questions, so no rate limit is needed.
EXPLAINS = ("--ficoco-explain", "--ficoco-explain-rate", "0")
_SECONDS = 600


def kept_patches(endpoint: Endpoint, variant: Variant, item: Item) -> dict[str, Any] | None:
    """Ask a question again, with tracing.

    Returns:
        `answer`, `grid` (rows, columns), `central_square` (see `Explanation`) and `kept`, the indices of the patches
        that are left after the last reduction; None where the server does not explain, or is busy.
    """
    assert item.image is not None
    body = {
        "image": data_url(item.image, item.media_type),
        "question": item.question,
        "max_tokens": endpoint.max_tokens,
        "compare": False,
    }
    setting = {"method": variant.served_name, "keep": variant.keep}
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    try:
        answer = httpx.post(
            f"{endpoint.url}/ficoco/explain", json=body | setting, headers=headers, timeout=_SECONDS
        )
        explanation = answer.raise_for_status().json()
    except httpx.HTTPError:
        return None
    rows, columns = explanation["grid"]
    last = explanation["layers"][-1]["kept"] if explanation["layers"] else list(range(rows * columns))
    return {
        "answer": explanation["reduced"]["answer"].strip(),
        "grid": [rows, columns],
        "central_square": explanation["central_square"],
        "kept": sorted(token for token in last if token < rows * columns),
    }
