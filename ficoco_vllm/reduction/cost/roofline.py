"""Lower bounds on the times of a device: its arithmetic, its memory and its launches against the work of a plan.

A stage takes the longest of three times: of each layer the longer of its FLOPs and its bytes, added up; and the time
to launch its kernels one after another. At batch 1 bytes or launches bound most GPUs, so fewer tokens gain less than
the ratio of FLOPs suggests; under load arithmetic bounds the prefill, and the KV cache the concurrent requests.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from ficoco_vllm.reduction.cost import flops
from ficoco_vllm.reduction.cost.memory import kv_bytes, num_parameters, to_bytes
from ficoco_vllm.reduction.cost.shapes import ModelShape
from ficoco_vllm.reduction.cost.tokens import TokenPlan

# Launches of a layer of vLLM's CLIP tower and of a Llama layer, and of FiCoCo's reduction in each, copies of indices
# included (test_device_work.py in tests/vision and tests/decoder).
TOWER_LAUNCHES, DECODER_LAUNCHES = 12, 10
TOWER_REDUCTION_LAUNCHES, DECODER_REDUCTION_LAUNCHES = 8, 32
# vLLM's defaults: tokens of a step, concurrent requests, share of the memory that it takes.
STEP_TOKENS, MOST_REQUESTS, MEMORY_SHARE = 8192, 256, 0.9


@dataclass(frozen=True)
class Device:
    """Ceilings of one device.

    Attributes:
        flops: 16-bit matrix FLOPs a second, dense.
        bandwidth: bytes a second from and to memory.
        memory_bytes: memory of the device.
        launch_seconds: from one kernel's launch to the next one's; 0 where nothing is launched.
        source: source of the figures.
    """

    name: str
    flops: float
    bandwidth: float
    memory_bytes: float
    launch_seconds: float
    source: str


# Data sheets give peaks. What large products and copies reach of them differs by chip, power limit and library; these
# shares are our assumption for all of them, until measured ceilings take their place.
REACHED_FLOPS, REACHED_BANDWIDTH = 0.65, 0.85
_LAUNCH = 4e-6
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("h100", 989e12, 3.35e12, 80e9, _LAUNCH, "NVIDIA H100 SXM data sheet"),
        Device("h200", 989e12, 4.8e12, 141e9, _LAUNCH, "NVIDIA H200 SXM data sheet"),
        Device("a100", 312e12, 2.039e12, 80e9, _LAUNCH, "NVIDIA A100 80GB SXM data sheet"),
        Device("l40s", 362e12, 0.864e12, 48e9, _LAUNCH, "NVIDIA L40S data sheet"),
        Device("mi300x", 1307e12, 5.3e12, 192e9, _LAUNCH, "AMD Instinct MI300X data sheet"),
    )
}


def reached(device: Device) -> Device:
    """The ceilings that a device is assumed to reach of its data sheet's."""
    return Device(
        device.name,
        REACHED_FLOPS * device.flops,
        REACHED_BANDWIDTH * device.bandwidth,
        device.memory_bytes,
        device.launch_seconds,
        f"{device.source}, {REACHED_FLOPS:.0%} of its FLOPs and {REACHED_BANDWIDTH:.0%} of its bandwidth assumed",
    )


@dataclass(frozen=True)
class Times:
    """Least times of one kind of request on one device.

    Attributes:
        tower_seconds: vision tower and projector, one request alone.
        prefill_seconds: decoder, from the embeddings to the first token, one request alone.
        decode_seconds: one further token, one request alone.
        num_concurrent: requests whose KV cache fits next to the weights, at most vLLM's default limit.
        requests_per_second: answered at that concurrency.
    """

    tower_seconds: float
    prefill_seconds: float
    decode_seconds: float
    num_concurrent: int
    requests_per_second: float

    @property
    def ttft_seconds(self) -> float:
        """Time to first token of one request alone."""
        return self.tower_seconds + self.prefill_seconds


def predict(
    shape: ModelShape,
    plan: TokenPlan,
    device: Device,
    *,
    num_text_tokens: int,
    num_images: int = 1,
    num_output_tokens: int = 128,
    dtype: str = "fp16",
) -> Times:
    """Least times of requests with images that follow one plan.

    Args:
        shape: sizes of the model.
        plan: plan of each image.
        device: ceilings.
        num_text_tokens: number of text tokens of the prompt.
        num_images: number of images of the prompt.
        num_output_tokens: number of output tokens of an answer, for the throughput.
        dtype: data type of weights and KV cache. Products are counted at the 16-bit rate.

    Returns:
        The times. They are lower bounds for these ceilings: scheduling, tokenization and images are not counted.

    Raises:
        ValueError: `num_output_tokens` is out of range.

    Source: arXiv:2402.16363, Section 2 (roofline).
    """
    if num_output_tokens < 1:
        raise ValueError(f"output_tokens: got {num_output_tokens}, allowed: at least 1")
    work = _Work(shape, plan, num_text_tokens, num_images, dtype)
    tokens, decoder = work.decoder_tokens, shape.decoder
    prompt_bytes = sum(kv_bytes(decoder, tokens[:-1], dtype))
    token_bytes = sum(kv_bytes(decoder, [1] * decoder.num_layers, dtype))
    weight_bytes = to_bytes(num_parameters(shape), dtype)
    free = MEMORY_SHARE * device.memory_bytes - weight_bytes
    fitting = int(free // (prompt_bytes + num_output_tokens * token_bytes)) if free > 0 else 0
    concurrent = min(MOST_REQUESTS, fitting)
    mean_kv_bytes = prompt_bytes + token_bytes * num_output_tokens / 2
    throughput = 0.0
    if concurrent:
        at_once = max(1, min(concurrent, STEP_TOKENS // max(tokens)))
        prompt_seconds = (work.tower(device, at_once) + work.prefill(device, at_once)) / at_once
        step_seconds = work.decode(device, concurrent, mean_kv_bytes)
        throughput = 1 / (prompt_seconds + num_output_tokens * step_seconds / concurrent)
    return Times(
        tower_seconds=work.tower(device),
        prefill_seconds=work.prefill(device),
        decode_seconds=work.decode(device, 1, prompt_bytes),
        num_concurrent=concurrent,
        requests_per_second=throughput,
    )


class _Work:
    """FLOPs, bytes and launches of the stages of a request, for any number of them in one batch."""

    def __init__(
        self, shape: ModelShape, plan: TokenPlan, num_text_tokens: int, num_images: int, dtype: str
    ) -> None:
        self.shape, self.plan, self.num_images, self.dtype = shape, plan, num_images, dtype
        self.decoder_tokens = [num_text_tokens + num_images * visual for visual in plan.decoder]
        decoder = shape.decoder
        self.head_bytes = to_bytes(decoder.hidden * decoder.vocab, dtype)

    def layer_bytes(self, num_tokens: int) -> int:
        """Bytes of a decoder layer's weights that a step reads; those of experts that no token chooses are not read."""
        decoder = self.shape.decoder
        projections = 2 * decoder.hidden * (decoder.query_width + decoder.kv_width)
        return to_bytes(round(projections + decoder.mlp_weights(num_tokens)), self.dtype)

    def tower(self, device: Device, batch: int = 1) -> float:
        """Seconds of vision tower and projector."""
        tower = self.shape.tower
        images = batch * self.num_images
        layer_bytes = to_bytes(4 * tower.hidden**2 + 2 * tower.hidden * tower.mlp, self.dtype)
        seconds, launches = 0.0, 0
        for tiles in zip(*(tile.layers for tile in self.plan.tiles), strict=True):
            work = images * sum(flops.tower_layer(tower, *counts).total for counts in tiles)
            # Residual stream, queries, keys, values, MLP: written once and read once.
            rows = images * sum(tower.rows(n) for n, _ in tiles)
            moved = layer_bytes + 2 * to_bytes(rows * (6 * tower.hidden + tower.mlp), self.dtype)
            seconds += max(work / device.flops, moved / device.bandwidth)
            reduces = any(n != m for n, m in tiles)
            launches += TOWER_LAUNCHES + TOWER_REDUCTION_LAUNCHES * reduces
        visual, runs = images * self.plan.num_projected(self.shape), 1 + len(self.shape.projector.layers)
        projector_bytes = to_bytes(runs * flops.projector_weights(self.shape), self.dtype)
        seconds += max(flops.projector(self.shape, visual) / device.flops, projector_bytes / device.bandwidth)
        return max(seconds, launches * device.launch_seconds)

    def prefill(self, device: Device, batch: int = 1) -> float:
        """Seconds of the decoder's layers and its head."""
        decoder = self.shape.decoder
        seconds, launches = 0.0, 0
        for n, m in pairwise(self.decoder_tokens):
            work = batch * flops.decoder_layer(decoder, n, m).total
            width = 3 * decoder.hidden + 2 * (decoder.query_width + decoder.kv_width)
            rows = to_bytes(batch * (n * width + 3 * m * decoder.mlp), self.dtype)
            moved = self.layer_bytes(batch * m) + 2 * rows
            seconds += max(work / device.flops, moved / device.bandwidth)
            launches += DECODER_LAUNCHES + DECODER_REDUCTION_LAUNCHES * (n != m)
        head = batch * flops.language_head(decoder)
        seconds += max(head / device.flops, self.head_bytes / device.bandwidth)
        return max(seconds, launches * device.launch_seconds)

    def decode(self, device: Device, batch: int, cached_bytes: float) -> float:
        """Seconds of one token for each request of a batch; decoding runs in CUDA graphs, so launches do not count."""
        decoder = self.shape.decoder
        weights = decoder.num_layers * self.layer_bytes(batch) + self.head_bytes
        layers = decoder.num_layers * flops.decoder_layer(decoder, 1, 1).total
        work = batch * (layers + flops.language_head(decoder))
        return max(work / device.flops, (weights + batch * cached_bytes) / device.bandwidth)
