"""One engine in a process of its own, filled with requests until its KV cache is full."""

import os
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import Image

from ficoco_vllm.compat import use_interpreter

NUM_TEXT_TOKENS = 60
NUM_DECODED = 48
MOST_REQUESTS = 256


def run(
    pipe: Connection, folder: str, ficoco: dict[str, Any] | None, kv_bytes: int, in_decoder: bool
) -> None:
    """Fill the engine and send what was counted.

    Args:
        pipe: for the result, a dict of `num_running` and `num_blocks`.
        folder: of the model.
        ficoco: our settings; None for stock vLLM without any plugin.
        kv_bytes: memory of the KV cache.
        in_decoder: whether the method works in the decoder, which needs model runner V2.
    """
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over the memory that all are given alike
    if ficoco is None:
        os.environ["VLLM_PLUGINS"] = ""
    if in_decoder:
        use_interpreter()
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        load_format="dummy",
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=4096,
        max_num_seqs=MOST_REQUESTS,
        block_size=32,
        kv_cache_memory_bytes=kv_bytes,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
        seed=0,
        disable_log_stats=True,
        additional_config={} if ficoco is None else {"ficoco": ficoco},
    )
    tokenizer = engine.get_tokenizer()
    text = tokenizer("what number is on the red sign? " * NUM_TEXT_TOKENS, add_special_tokens=False).input_ids
    prompt = [tokenizer.convert_tokens_to_ids("<image>"), *text[:NUM_TEXT_TOKENS]]
    rng = np.random.default_rng(0)
    requests = [
        {
            "prompt_token_ids": prompt,
            "multi_modal_data": {
                "image": Image.fromarray(rng.integers(0, 255, (336, 336, 3), dtype=np.uint8))
            },
        }
        for _ in range(MOST_REQUESTS)
    ]
    params = SamplingParams(max_tokens=NUM_DECODED, temperature=0, ignore_eos=True, detokenize=False)
    engine.enqueue(requests, params, use_tqdm=False)
    pipe.send(_fill(engine))


def _fill(engine: Any) -> dict[str, int]:
    """Step until a request must wait for blocks, and count those that run."""
    core = engine.llm_engine.engine_core.engine_core
    scheduler = core.scheduler
    peak, steps_without_growth = 0, 0
    # A request waits when its prompt does not fit; a few steps without growth tell that from a full step budget.
    while steps_without_growth < 3 and engine.llm_engine.has_unfinished_requests():
        engine.llm_engine.step()
        num_running = len(scheduler.running)
        steps_without_growth = 0 if num_running > peak else steps_without_growth + 1
        peak = max(peak, num_running)
    return {"num_running": peak, "num_blocks": int(scheduler.kv_cache_manager.block_pool.num_gpu_blocks)}
