"""Savings of a setting: planned KV cache, measured time to first token."""

import asyncio
import io
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ficoco_vllm.benchmarks.accuracy.client import Endpoint
from ficoco_vllm.benchmarks.accuracy.variants import Variant
from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.harness.http import first_token, png
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.reduction.cost import model_shape
from ficoco_vllm.reduction.cost.memory import kv_bytes


def visual_tokens_of_layers(variant: Variant, num_layers: int, num_tokens: int) -> list[int]:
    """Visual tokens of an image that each decoder layer's KV cache holds.

    Args:
        variant: a method with its budget, or all tokens.
        num_layers: of the decoder.
        num_tokens: visual tokens of an image without reduction.

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
    """KV cache of a prompt with one image, with and without the reduction.

    Args:
        config: the model's config.json.
        variant: a method with its budget.
        num_tokens: visual tokens of an image without reduction.
        num_text_tokens: of the prompt, on average.

    Returns:
        Bytes before and after, in 16 bits, and the share that is saved.
    """
    decoder = model_shape(config).decoder
    text = round(num_text_tokens)
    before, after = (
        sum(kv_bytes(decoder, [text + count for count in layers], "fp16"))
        for layers in (
            [num_tokens] * decoder.num_layers,
            visual_tokens_of_layers(variant, decoder.num_layers, num_tokens),
        )
    )
    return {"full_bytes": before, "bytes": after, "saving": round(1 - after / before, 4)}


def first_token_ratio(
    endpoint: Endpoint, variants: Sequence[Variant], items: Sequence[Item], seed: int
) -> dict[str, dict[str, float]]:
    """Median time to first token of each variant; they take turns, one request at a time, each with a new image.

    Args:
        endpoint: the server.
        variants: the first is the one that the others are compared with.
        items: questions; the first one warms up and is not counted.
        seed: of the pixels that make an image new.

    Returns:
        Key of the variant to `seconds` and `speedup` over the first variant, medians over the questions.
    """
    rng = random.Random(seed)
    turns = [
        (variant, with_new_pixel(item, rng))
        for item in items
        for variant in rng.sample(list(variants), len(variants))
    ]
    times = asyncio.run(_first_tokens(endpoint, turns))
    counted = list(zip(turns, times, strict=True))[len(variants) :]
    seconds = {
        variant.key: [time for (timed, _), time in counted if timed == variant] for variant in variants
    }
    base = seconds[variants[0].key]
    return {
        key: {
            "seconds": statistics.median(taken),
            "speedup": statistics.median(a / b for a, b in zip(base, taken, strict=True)),
        }
        for key, taken in seconds.items()
    }


async def _first_tokens(endpoint: Endpoint, turns: Sequence[tuple[Variant, Item]]) -> list[float]:
    async with endpoint.client(max_retries=0) as client:
        return [(await first_token(client, endpoint.body(variant, item)))[0] for variant, item in turns]


def with_new_pixel(item: Item, rng: random.Random) -> Item:
    """The same question with one pixel of its image changed, which no cache holds."""
    assert item.image is not None
    image = Image.open(io.BytesIO(item.image)).convert("RGB")
    place = (rng.randrange(image.width), rng.randrange(image.height))
    image.putpixel(place, tuple(rng.randrange(256) for _ in range(3)))
    return Item(item.name, item.kind, item.question, png(image), item.answer)
