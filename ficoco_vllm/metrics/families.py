"""Prometheus metrics of the reduction's savings and costs; docs/metrics.md lists them.

Every process counts its own part: the front end requests, the engine core KV blocks, a worker seconds. With
`PROMETHEUS_MULTIPROC_DIR` (`ficoco-vllm serve` sets it) prometheus_client adds them up at `/metrics`.
"""

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from ficoco_vllm.config import FicocoConfig

LABELS = ("model_name", "engine", "method")
# Values of the label `method` where no method reduced anything.
OFF = "off"
TEXT = "text"
# Value of the label `engine` where the engine of a request is unknown.
NO_ENGINE = ""

TOKEN_BUCKETS = (1, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 288, 384, 480, 576)
_MICROSECONDS = (10, 25, 50, 100, 250, 500, 1e3, 2.5e3, 5e3, 1e4, 2.5e4, 5e4, 1e5, 2.5e5, 5e5, 1e6)
REDUCTION_BUCKETS = tuple(value / 1e6 for value in _MICROSECONDS)
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
ITL_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)


class Metrics:
    """The metric families of one registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"ficoco:{name}", text, (*LABELS, *more), registry=registry)

        def gauge(name: str, text: str, mode: Literal["mostrecent", "sum"], *more: str) -> Gauge:
            return Gauge(f"ficoco:{name}", text, (*LABELS, *more), registry=registry, multiprocess_mode=mode)

        def histogram(name: str, text: str, buckets: Sequence[float], *more: str) -> Histogram:
            return Histogram(f"ficoco:{name}", text, (*LABELS, *more), buckets=buckets, registry=registry)

        self.visual_tokens_in = counter(
            "visual_tokens_in",
            "Visual tokens (patches) of the images of prompts that were prefilled, before any reduction.",
        )
        self.visual_tokens_kept = counter(
            "visual_tokens_kept",
            "Visual tokens of the same prompts that remain after the last reduction: in the prompt, or for a "
            "method of the decoder in its last segment.",
        )
        self.kv_tokens_avoided = counter(
            "kv_tokens_avoided",
            "Prompt tokens without a slot in the KV cache of a segment of decoder layers (one segment, 0, unless "
            "the method works in the decoder), compared with the prompt without reduction, for each prefill.",
            "segment",
        )
        self.kv_bytes_avoided = counter(
            "kv_bytes_avoided",
            "Bytes of keys and values of these tokens in all layers of the segment, on all tensor-parallel workers.",
            "segment",
        )
        self.kv_blocks_held = gauge(
            "kv_blocks_held",
            "KV blocks that requests hold in a segment of decoder layers; method is the server's.",
            "mostrecent",
            "segment",
        )
        self.kv_blocks_saved = gauge(
            "kv_blocks_saved",
            "KV blocks that running requests would additionally hold in a segment without reduction: their missing "
            "tokens by the size of a block, not rounded.",
            "sum",
            "segment",
        )
        self.reduction_seconds = histogram(
            "reduction_seconds",
            "Time of the reduction itself (scores, filter, correlate, compress) on the device of the first "
            "tensor-parallel worker, in the tower for one batch of images, in the decoder for one step.",
            REDUCTION_BUCKETS,
            "site",
        )
        self.budget_tokens = histogram(
            "budget_tokens",
            "Visual tokens of an image that a request may keep, by its own choice or by the server's default; one "
            "observation for each image of a prompt that was prefilled.",
            TOKEN_BUCKETS,
        )
        self.requests = counter(
            "requests",
            "Requests that ended, by outcome: the finish reasons of vLLM (stop, length, abort, error, ...), abort "
            "also where the client disconnected, and refused for those that were answered with HTTP 400 "
            "because of their reduction.",
            "outcome",
        )
        self.prefill_flops_avoided = counter(
            "prefill_flops_avoided",
            "Floating-point operations from pixels to the first token that prefilled prompts did not need, by the "
            "cost model of `ficoco-vllm plan`: without reduction minus with it, its own work included; prefix "
            "cache hits are ignored.",
        )
        self.default_budget_tokens = gauge(
            "default_budget_tokens",
            "Visual tokens of an image that a request may keep now if it names no budget; fixed, unless the budget "
            "follows the load.",
            "mostrecent",
        )
        self.quality_target = gauge(
            "quality_target",
            "Target agreement; this and all other quality_ metrics exist only where there is one.",
            "mostrecent",
        )
        self.quality_comparisons = counter(
            "quality_comparisons",
            "Answers at a budget that were compared with the full model's.",
            "keep",
            "traffic",
        )
        self.quality_score = counter(
            "quality_score",
            "Sum of their scores: 1 for the same text, for sampled answers the mean probability at which the full "
            "model would have accepted a token.",
            "keep",
            "traffic",
        )
        self.quality_tokens = counter("quality_tokens", "Tokens of second answers, prompts and outputs.")
        self.quality_skipped = counter(
            "quality_skipped", "Requests that were chosen and not compared: no room, failed.", "reason"
        )
        self.quality_budget_tokens = gauge(
            "quality_budget_tokens",
            "Visual tokens of an image that requests without a budget keep now.",
            "mostrecent",
            "traffic",
        )
        self.quality_agreement_low = gauge(
            "quality_agreement_low",
            "Lower bound of the agreement at this budget, in its present trial.",
            "mostrecent",
            "traffic",
        )
        self.quality_agreement_high = gauge(
            "quality_agreement_high", "Upper bound of the same.", "mostrecent", "traffic"
        )
        self.quality_trial_comparisons = gauge(
            "quality_trial_comparisons", "Comparisons on which these bounds rest.", "mostrecent", "traffic"
        )
        self.quality_falls = gauge(
            "quality_falls",
            "Times that the budget went back to the top of the ladder.",
            "mostrecent",
            "traffic",
        )
        self.time_to_first_token_seconds = histogram(
            "time_to_first_token_seconds",
            "Time from the arrival of a request to its first token, as vllm:time_to_first_token_seconds.",
            TTFT_BUCKETS,
        )
        self.inter_token_latency_seconds = histogram(
            "inter_token_latency_seconds",
            "Time between two outputs of a request, as vllm:inter_token_latency_seconds.",
            ITL_BUCKETS,
        )


@cache
def metrics() -> Metrics:
    """The families of this process, made on first use."""
    return Metrics()


def set_default_budget(model_name: str, method: str, num_tokens: int, engine: int = 0) -> None:
    """Report the budget of requests that name none.

    Args:
        model_name: as served.
        method: the server's.
        num_tokens: visual tokens of an image.
        engine: index of the engine whose load decides.
    """
    metrics().default_budget_tokens.labels(model_name, str(engine), method).set(num_tokens)


def count_refusal(model_config: Any) -> None:
    """Count a request that is answered with HTTP 400 because of its reduction, under the server's method.

    Args:
        model_config: vLLM's configuration of the model, with our settings stored on transformers'.
    """
    config = FicocoConfig.of(model_config.hf_config)
    if config.method is not None and config.metrics:
        labels = (model_config.served_model_name, NO_ENGINE, config.method, "refused")
        metrics().requests.labels(*labels).inc()


def observe_all(histogram: Histogram, values: Sequence[float]) -> None:
    """Observe many values with one write for each bucket.

    Args:
        histogram: with its labels set.
        values: in the histogram's unit.
    """
    tally = Tally(bisect_left(histogram._upper_bounds, value) for value in values)
    for index, count in tally.items():
        histogram._buckets[index].inc(count)
    histogram._sum.inc(sum(values))
