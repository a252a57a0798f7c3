"""The cost of one request, counted inside the process of its engine: products, KV blocks, seconds."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import psutil

from ficoco_vllm.benchmarks.efficiency.tables import Row
from ficoco_vllm.benchmarks.harness.engine import image_request, scheduler_of, worker_of

BLOCK_SIZE = 32  # the smallest of vLLM's CPU attention
MAX_MODEL_LEN = 1152  # an image and Table 9's 512 tokens of text fit


def measure(engine: Any, row: Row, num_text_tokens: int, seed: int) -> dict[str, float]:
    """Answer one request with a new image, from pixels to the first token.

    Returns:
        `ttft_seconds`; `flops` of the products in the decoder and its head; `kv_bytes` of the blocks that the scheduler
        gives the prompt; `resident_bytes` of the process afterwards.
    """
    from vllm import SamplingParams

    body = image_request(engine, num_text_tokens, seed, ficoco_keep=row.tower)
    extra = {"ficoco_keep": row.decoder}
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra)
    with _products(engine) as flops, _blocks(engine) as kv_bytes:
        start = time.perf_counter()
        engine.generate([body], params, use_tqdm=False)
        ttft = time.perf_counter() - start
    return {
        "ttft_seconds": ttft,
        "flops": sum(flops),
        "kv_bytes": kv_bytes[0],
        "resident_bytes": psutil.Process().memory_info().rss,
    }


def _decoder(engine: Any) -> Any:
    return worker_of(engine).model_runner.get_model().language_model


def set_scales(engine: Any) -> None:
    """Set the scales of an fp8 KV cache to 1, as without any in a checkpoint; made-up ones may be negative."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention.attention import set_default_quant_scales

    for module in _decoder(engine).modules():
        if isinstance(module, Attention):
            set_default_quant_scales(module)


@contextmanager
def _products(engine: Any) -> Iterator[list[int]]:
    """FLOPs of the decoder's products, two for a multiply-add, from the shapes of its modules' inputs."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    flops: list[int] = []

    def count(module: Any, arguments: tuple[Any, ...]) -> None:
        match module:
            case LinearBase():
                flops.append(2 * len(arguments[0]) * module.input_size * module.output_size)
            case LogitsProcessor():
                flops.append(2 * arguments[1].numel() * module.org_vocab_size)
            case Attention():
                # A prompt computed in one step has as many keys as queries; the full square is counted.
                flops.append(4 * len(arguments[0]) ** 2 * module.num_heads * module.head_size)

    with ExitStack() as stack:
        for module in _decoder(engine).modules():
            stack.callback(module.register_forward_pre_hook(count).remove)
        yield flops


@contextmanager
def _blocks(engine: Any) -> Iterator[list[int]]:
    """Bytes of the KV blocks that are held each time the scheduler has planned a step."""
    scheduler = scheduler_of(engine)
    manager, schedule = scheduler.kv_cache_manager, scheduler.schedule
    groups = manager.kv_cache_config.kv_cache_groups
    held_bytes: list[int] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        result = schedule(*args, **kwargs)
        held_bytes.append(
            sum(
                len(blocks) * group.kv_cache_spec.page_size_bytes * len(group.layer_names)
                for group, held in zip(groups, manager.coordinator.single_type_managers, strict=True)
                for blocks in held.req_to_blocks.values()
            )
        )
        return result

    with patch.object(scheduler, "schedule", noting):
        yield held_bytes
