"""One engine in a process of its own, which answers one request at a time."""

import os
import time
from collections.abc import Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import Image

from ficoco_vllm.benchmarks.ttft.kinds import NUM_TEXT_TOKENS
from ficoco_vllm.compat import use_interpreter


def run(
    pipe: Connection, folder: str, ficoco: Mapping[str, Any] | None, in_decoder: bool, dtype: str
) -> None:
    """Serve until told to stop.

    Args:
        pipe: receives (keep, seed) or None, sends what `_measure` returns.
        folder: of the model.
        ficoco: our settings; None for stock vLLM without any plugin.
        in_decoder: whether the method works in the decoder, which needs model runner V2.
        dtype: of weights and activations.
    """
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    stock = ficoco is None
    if stock:
        os.environ["VLLM_PLUGINS"] = ""
    if in_decoder:
        use_interpreter()
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        load_format="dummy",
        dtype=dtype,
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        max_num_seqs=1,
        limit_mm_per_prompt={"image": 1},
        seed=0,
        disable_log_stats=True,
        kv_cache_memory_bytes=2**30,
        additional_config={} if ficoco is None else {"ficoco": dict(ficoco)},
    )
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
    prompt = _prompt(engine.get_tokenizer())
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        keep, seed = job
        asked = {"ficoco_keep": keep} if ficoco is not None and not in_decoder else {}
        pipe.send(_measure(engine, params, prompt, asked, seed, stock=stock))


def _prompt(tokenizer: Any) -> list[int]:
    """One image and exactly `NUM_TEXT_TOKENS` tokens of text."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = tokenizer("what number is on the red sign? " * NUM_TEXT_TOKENS, add_special_tokens=False).input_ids
    return [image, *text[:NUM_TEXT_TOKENS]]


def _measure(
    engine: Any, params: Any, prompt: list[int], asked: dict[str, int], seed: int, *, stock: bool
) -> dict[str, float]:
    """Time one request with an image never seen before, from pixels to the first token.

    Returns:
        `ttft_seconds`, `tower_seconds`, of these `reduction_seconds`, `decoder_reduction_seconds`, and
        `num_prompt_tokens`.
    """
    pixels = np.random.default_rng(seed).integers(0, 255, (336, 336, 3), dtype=np.uint8)
    body: dict[str, Any] = {
        "prompt_token_ids": prompt,
        "multi_modal_data": {"image": Image.fromarray(pixels)},
    }
    if asked:
        body["mm_processor_kwargs"] = asked
    with _stopwatch(engine, stock) as seconds:
        start = time.perf_counter()
        (output,) = engine.generate([body], params, use_tqdm=False)
        ttft = time.perf_counter() - start
    return {
        "ttft_seconds": ttft,
        "tower_seconds": seconds["tower"],
        "reduction_seconds": seconds["reduction"],
        "decoder_reduction_seconds": seconds["decoder_reduction"],
        "num_prompt_tokens": len(output.prompt_token_ids),
    }


@contextmanager
def _stopwatch(engine: Any, stock: bool) -> Any:
    """Seconds spent in the vision tower (without the projector), in reducing within it, and in the decoder's reducing.

    The reduction is everything that a stock tower would not do: the scores out of queries and keys, the choice,
    the merge. It runs on the CPU, so a call is over when it returns.
    """
    worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker
    model = getattr(worker, "worker", worker).model_runner.get_model()
    seconds = {"tower": 0.0, "reduction": 0.0, "decoder_reduction": 0.0}

    def timed(function: Any, key: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[key] += time.perf_counter() - start

        return call

    patches = [(model.vision_tower, "forward", "tower")]
    if not stock:
        from ficoco_vllm.decoder import decoder
        from ficoco_vllm.models import reduced_llava
        from ficoco_vllm.vision import tower

        patches += [(reduced_llava, "encode", "tower"), (tower, "_reduce", "reduction")]
        patches += [(decoder, "reduce_rows", "decoder_reduction")]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for (owner, name, key), (_, _, original) in zip(patches, originals, strict=True):
        setattr(owner, name, timed(original, key))
    try:
        yield seconds
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
