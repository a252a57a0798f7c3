"""Chats, timed inside the process of their engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any
from unittest.mock import patch

from ficoco_vllm.benchmarks.harness.engine import random_image, request, scheduler_of, text_tokens

NUM_TURNS = 5
NUM_QUESTION, NUM_SYSTEM, NUM_ANSWER = 40, 500, 4
NUM_IMAGES = 3
Figures = dict[str, float]


def image_chat(engine: Any, cold: bool, seed: int) -> Figures:
    """Ask five questions about one image, each after the answers to those before; if `cold`, without a prefix cache.

    Returns:
        `ttft_seconds`, the mean of turns 2 to 5, `cached_share` of the prompts' tokens in these turns, and
        `num_beyond_plan`, the KV blocks at the end of the chat that are beyond the plan.
    """
    tokens = [_image_token(engine)]
    ends: list[int] = []
    seconds, cached = [], []
    with _blocks_beyond_plan(engine) as beyond:
        for _ in range(NUM_TURNS):
            tokens += text_tokens(engine, NUM_QUESTION)
            output, length = _answer(engine, tokens, seed, cold, ends)
            ends = ends or [length]
            seconds.append(output.metrics.first_token_latency)
            cached.append(output.num_cached_tokens / length)
            tokens += output.outputs[0].token_ids
    return {
        "ttft_seconds": fmean(seconds[1:]),
        "cached_share": fmean(cached[1:]),
        "num_beyond_plan": beyond[-1],
    }


def shared_system_prompt(engine: Any, cold: bool, seed: int) -> Figures:
    """Ask about several images after the same system prompt, whose first use is not counted; see `image_chat`.

    Returns:
        `ttft_seconds`, the mean, and `cached_tokens`, the least of a request.
    """
    # A number of several tokens, so that no earlier prompt has the same blocks.
    system = (text_tokens(engine, 16, f"{seed} ") + text_tokens(engine, NUM_SYSTEM))[:NUM_SYSTEM]
    tokens = [*system, _image_token(engine), *text_tokens(engine, NUM_QUESTION)]
    outputs = [_answer(engine, tokens, seed + index, cold, [])[0] for index in range(1 + NUM_IMAGES)]
    return {
        "ttft_seconds": fmean(output.metrics.first_token_latency for output in outputs[1:]),
        "cached_tokens": min(output.num_cached_tokens for output in outputs[1:]),
    }


def _answer(engine: Any, tokens: list[int], seed: int, cold: bool, ends: list[int]) -> tuple[Any, int]:
    """The output for a prompt with an image and the prompt's number of tokens; `ends` are those of its windows."""
    from vllm import SamplingParams

    windows = ends and engine.llm_engine.vllm_config.additional_config
    params = SamplingParams(
        max_tokens=NUM_ANSWER,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        skip_reading_prefix_cache=cold,
        extra_args={"ficoco_window": ends} if windows else None,
    )
    (output,) = engine.generate([request(tokens, [random_image(seed)])], params, use_tqdm=False)
    return output, len(output.prompt_token_ids)


def _image_token(engine: Any) -> int:
    return int(engine.get_tokenizer().convert_tokens_to_ids("<image>"))


@contextmanager
def _blocks_beyond_plan(engine: Any) -> Iterator[list[int]]:
    """KV blocks that each request holds when it ends, less those that its tokens need by the plan."""
    scheduler = scheduler_of(engine)
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    plans: dict[str, Any] = getattr(scheduler, "plans", {})
    original, beyond = scheduler._free_request, list[int]()

    def free(request: Any, *args: Any, **kwargs: Any) -> Any:
        held = sum(len(manager.req_to_blocks[request.request_id]) for manager in managers)
        plan, count = plans.get(request.request_id), request.num_computed_tokens
        needed = [
            count if plan is None else plan.num_kv_tokens(index, count) for index in range(len(managers))
        ]
        beyond.append(held - sum(-(-tokens // managers[0].block_size) for tokens in needed))
        return original(request, *args, **kwargs)

    with patch.object(scheduler, "_free_request", free):
        yield beyond
