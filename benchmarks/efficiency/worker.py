"""One engine in a process of its own, and what a request costs in it: products, KV blocks, seconds."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
from PIL import Image

from ficoco_vllm.benchmarks.efficiency.rows import SETTINGS, Row
from ficoco_vllm.compat import use_interpreter

BLOCK_SIZE = 32  # the smallest of vLLM's CPU attention
MAX_MODEL_LEN = 1152  # an image and Table 9's 512 tokens of text fit


@dataclass
class Products:
    """FLOPs of what the decoder has multiplied, two for a multiply-add."""

    linear: int = 0
    attention: int = 0


def run(pipe: Connection, folder: str, kv_bits: int, num_text_tokens: int) -> None:
    """Serve until told to stop.

    Args:
        pipe: receives (row, seed) or None, sends what `_measure` returns.
        folder: of the model.
        kv_bits: of a value in the KV cache, 16 or 8.
        num_text_tokens: of a prompt, besides its image.
    """
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    use_interpreter()
    from vllm import LLM

    engine = LLM(
        folder,
        load_format="dummy",
        dtype="bfloat16",
        kv_cache_dtype="auto" if kv_bits == 16 else "fp8",
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_MODEL_LEN,
        max_num_seqs=1,
        block_size=BLOCK_SIZE,
        limit_mm_per_prompt={"image": 1},
        seed=0,
        disable_log_stats=True,
        kv_cache_memory_bytes=2**30,
        additional_config={"ficoco": SETTINGS},
    )
    _set_scales(engine)
    tokenizer = engine.get_tokenizer()
    text = tokenizer("what number is on the red sign? " * num_text_tokens, add_special_tokens=False).input_ids
    prompt = [tokenizer.convert_tokens_to_ids("<image>"), *text[:num_text_tokens]]
    while (job := pipe.recv()) is not None:
        row, seed = job
        pipe.send(_measure(engine, prompt, row, seed))


def _measure(engine: Any, prompt: list[int], row: Row, seed: int) -> dict[str, float]:
    """Answer one request with an image never seen before, from pixels to the first token.

    Returns:
        `ttft_seconds`; `linear_flops` and `attention_flops` of the decoder and its head; `kv_bytes` of the blocks that
        the scheduler gives the prompt; `resident_bytes` of the process afterwards.
    """
    from vllm import SamplingParams

    pixels = np.random.default_rng(seed).integers(0, 255, (336, 336, 3), dtype=np.uint8)
    body: dict[str, Any] = {
        "prompt_token_ids": prompt,
        "multi_modal_data": {"image": Image.fromarray(pixels)},
        "mm_processor_kwargs": {"ficoco_keep": row.tower},
    }
    extra = {"ficoco_keep": row.decoder}
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra)
    with _products(engine) as products, _blocks(engine) as kv_bytes:
        start = time.perf_counter()
        engine.generate([body], params, use_tqdm=False)
        ttft = time.perf_counter() - start
    return {
        "ttft_seconds": ttft,
        "linear_flops": products.linear,
        "attention_flops": products.attention,
        "kv_bytes": kv_bytes[0],
        "resident_bytes": psutil.Process().memory_info().rss,
    }


def _core(engine: Any) -> Any:
    return engine.llm_engine.engine_core.engine_core


def _decoder(engine: Any) -> Any:
    worker = _core(engine).model_executor.driver_worker
    return getattr(worker, "worker", worker).model_runner.get_model().language_model


def _set_scales(engine: Any) -> None:
    """Those of an fp8 KV cache, made up with the weights, may be negative; a checkpoint without has 1."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention.attention import set_default_quant_scales

    for module in _decoder(engine).modules():
        if isinstance(module, Attention):
            set_default_quant_scales(module)


@contextmanager
def _products(engine: Any) -> Iterator[Products]:
    """Count what the decoder multiplies, from the shapes that its modules are given."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    found = Products()

    def linear(module: Any, arguments: tuple[Any, ...]) -> None:
        found.linear += 2 * arguments[0].shape[0] * module.input_size * module.output_size

    def head(module: Any, arguments: tuple[Any, ...]) -> None:
        found.linear += 2 * arguments[1].shape[0] * arguments[1].shape[1] * module.org_vocab_size

    def attention(module: Any, arguments: tuple[Any, ...]) -> None:
        # Of one prompt that is computed in one step: as many keys as queries, over the full square.
        found.attention += 4 * arguments[0].shape[0] ** 2 * module.num_heads * module.head_size

    handles = []
    for module in _decoder(engine).modules():
        for kind, hook in ((LinearBase, linear), (LogitsProcessor, head), (Attention, attention)):
            if isinstance(module, kind):
                handles.append(module.register_forward_pre_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _blocks(engine: Any) -> Iterator[list[int]]:
    """Bytes of the KV blocks that are held each time the scheduler has planned a step."""
    scheduler = _core(engine).scheduler
    manager, schedule = scheduler.kv_cache_manager, scheduler.schedule
    groups = manager.kv_cache_config.kv_cache_groups
    found: list[int] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        result = schedule(*args, **kwargs)
        found.append(
            sum(
                len(blocks) * group.kv_cache_spec.page_size_bytes * len(group.layer_names)
                for group, held in zip(groups, manager.coordinator.single_type_managers, strict=True)
                for blocks in held.req_to_blocks.values()
            )
        )
        return result

    scheduler.schedule = noting
    try:
        yield found
    finally:
        scheduler.schedule = schedule
