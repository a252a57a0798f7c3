"""Effects of a reduction: on the first token's distribution, the patches that are left, KV cache and latency."""

import asyncio
import io
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx
from PIL import Image

from ficoco_vllm.benchmarks.accuracy.client import Endpoint
from ficoco_vllm.benchmarks.accuracy.variants import Variant, full
from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.harness.http import data_url, first_token, png
from ficoco_vllm.benchmarks.harness.rounds import ratios
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.reduction.cost import model_shape
from ficoco_vllm.reduction.cost.memory import kv_bytes

# Options of a server that explains; its only client asks few questions, so no rate limit is needed.
EXPLAINS = ("--ficoco-explain", "--ficoco-explain-rate", "0")
_TINY = 1e-12


def divergence(full: Mapping[str, float], reduced: Mapping[str, float]) -> float:
    """Lower bound of the KL divergence of the first token, full model to reduced one, in nats.

    A server names only the most likely tokens with their log-probabilities. Those that both name stay apart, all others
    are one outcome. Joining outcomes can only lessen the divergence; it is exact where the others weigh nothing.
    """
    both = full.keys() & reduced.keys()
    p, q = ([math.exp(side[token]) for token in both] for side in (full, reduced))
    p.append(max(0.0, 1.0 - sum(p)))
    q.append(max(0.0, 1.0 - sum(q)))
    return max(0.0, sum(a * math.log(a / max(b, _TINY)) for a, b in zip(p, q, strict=True) if a > _TINY))


def kept_patches(endpoint: Endpoint, variant: Variant, item: Item) -> dict[str, Any] | None:
    """Answer to a question asked again with tracing (docs/explain.md), or None where the server does not explain.

    With `answer` come `grid` (rows, columns), `central_square` (see `Explanation`) and `kept`, the indices of the
    patches that are left after the last reduction. A busy server does not explain either.
    """
    assert item.image is not None
    body = {
        "image": data_url(item.image, item.media_type),
        "question": item.question,
        "max_tokens": endpoint.max_tokens,
        "compare": False,
        "method": variant.served_name,
        "keep": variant.keep,
    }
    headers, url = {"Authorization": f"Bearer {endpoint.api_key}"}, f"{endpoint.url}/ficoco/explain"
    try:
        explanation = httpx.post(url, json=body, headers=headers, timeout=600).raise_for_status().json()
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


def visual_tokens_of_layers(variant: Variant, num_layers: int, num_tokens: int) -> list[int]:
    """Visual tokens of an image that each decoder layer's KV cache holds, of `num_tokens` without reduction.

    Raises:
        ValueError: the method cannot reach the budget in so many layers.
    """
    keep = num_tokens if variant.keep is None else variant.keep
    if variant.method is None or variant.site == "tower":
        return [keep] * num_layers
    config = FicocoConfig(method=variant.method, keep=keep)
    entering = config.tower_part(num_tokens).keep or num_tokens
    planner = DecoderPlanner.shared(config, num_layers, entering)
    counts = planner.counts(planner.method, entering, keep)
    return [counts[planner.segments.of_layer(layer)] for layer in range(num_layers)]


def kv_saving(
    config: Mapping[str, Any], variant: Variant, num_tokens: int, num_text_tokens: float
) -> dict[str, Any]:
    """Bytes of the KV cache of a prompt with one image, in 16 bits, without and with a reduction, and the share saved.

    `config` is the model's config.json, `num_tokens` counts visual tokens of an unreduced image.
    """
    decoder, text = model_shape(config).decoder, round(num_text_tokens)
    layers = (
        visual_tokens_of_layers(one, decoder.num_layers, num_tokens) for one in (full(variant.site), variant)
    )
    before, after = (sum(kv_bytes(decoder, [text + count for count in counts], "fp16")) for counts in layers)
    return {"full_bytes": before, "bytes": after, "saving": round(1 - after / before, 4)}


def first_token_speedup(
    endpoint: Endpoint, reference: Variant, variant: Variant, items: Sequence[Item], seed: int
) -> dict[str, float]:
    """Time to first token of a variant in `seconds`, and its `speedup` over a reference: medians over the questions.

    The two take turns, one request at a time, each with a new image. The first question warms up and is not counted.
    """
    rng = random.Random(seed)

    async def measured() -> list[dict[str, float]]:
        rounds: list[dict[str, float]] = []
        async with endpoint.client(max_retries=0) as client:
            for item in items:
                rounds.append({})
                for one in rng.sample((reference, variant), 2):
                    body = endpoint.body(one, _with_new_pixel(item, rng))
                    rounds[-1][one.key], _ = await first_token(client, body)
        return rounds[1:]

    rounds = asyncio.run(measured())
    before, after = ([taken[one.key] for taken in rounds] for one in (reference, variant))
    return {"seconds": statistics.median(after), "speedup": statistics.median(ratios(before, after))}


def _with_new_pixel(item: Item, rng: random.Random) -> Item:
    """The same question with one pixel of its image changed, which no cache holds."""
    image = Image.open(io.BytesIO(item.image or b"")).convert("RGB")
    place = (rng.randrange(image.width), rng.randrange(image.height))
    image.putpixel(place, tuple(rng.randrange(256) for _ in range(3)))
    return replace(item, image=png(image), media_type="image/png")
