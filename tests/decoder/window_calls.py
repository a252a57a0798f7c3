"""Functions that tests of decision windows run inside the process of the engine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_utils import get_group_id
from vllm.v1.metrics.stats import PrefixCacheStats

import ficoco_vllm.decoder.decoder as decoder
import ficoco_vllm.kv.scheduler as scheduling
import ficoco_vllm.planning.decoder as planning
from ficoco_vllm.decoder.cached_keys import cached_keys
from ficoco_vllm.planning.decoder import RequestPlan
from tests.decoder.calls import Ask
from tests.support.engine import scheduler_of, worker_of


@dataclass
class Reply:
    """Greedy tokens, log-probabilities (tokens, vocabulary), and prompt tokens, of which some were cached."""

    tokens: list[int]
    logprobs: Tensor
    num_prompt_tokens: int
    num_cached: int


def ask(
    engine: LLM, asks: Sequence[Ask], cold: bool = False, salt: str | None = None, **options: Any
) -> list[Reply]:
    """Send requests together.

    Args:
        engine: in this process.
        asks: the requests.
        cold: whether they compute all of their tokens, whatever the cache has.
        salt: of the cache.
        **options: of `LLM.generate`.
    """
    more = {"skip_reading_prefix_cache": True} if cold else {}
    bodies = [one.body() | ({"cache_salt": salt} if salt else {}) for one in asks]
    params = [one.params(**more) for one in asks]
    return [_reply(output) for output in engine.generate(bodies, params, use_tqdm=False, **options)]


def ask_each(engine: LLM, asks: Sequence[Ask], cold: bool = False, salt: str | None = None) -> list[Reply]:
    """The same, one after the other."""
    return [reply for one in asks for reply in ask(engine, [one], cold, salt)]


def ask_with_adapters(engine: LLM, asks: Sequence[Ask], folders: Sequence[str]) -> list[Reply]:
    """Send requests together, each with the adapter of a folder."""
    numbers = {folder: number + 1 for number, folder in enumerate(dict.fromkeys(folders))}
    adapters = [LoRARequest(folder, numbers[folder], folder) for folder in folders]
    return ask(engine, asks, lora_request=adapters)


def ask_counting_drafts(engine: LLM, asks: Sequence[Ask]) -> tuple[list[Reply], int]:
    """Send requests together to an engine with drafts, and count the drafts that it verifies."""
    scheduler = scheduler_of(engine)
    counts: list[int] = []
    original = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        scheduled = original(*args, **kwargs)
        counts.extend(len(tokens) for tokens in scheduled.scheduled_spec_decode_tokens.values())
        return scheduled

    scheduler.schedule = schedule
    try:
        return ask(engine, asks), sum(counts)
    finally:
        scheduler.schedule = original


def samples(engine: LLM, one: Ask, count: int) -> tuple[list[list[int]], int]:
    """Several random answers to one request, and the cached tokens of its prompt."""
    params = SamplingParams(temperature=1.0, seed=3, n=count, max_tokens=one.num_tokens, ignore_eos=True)
    (output,) = engine.generate([one.body()], params, use_tqdm=False)
    return [list(answer.token_ids) for answer in output.outputs], int(output.num_cached_tokens or 0)


def ask_in_steps(
    engine: LLM, asks: Sequence[Ask], most: int, cold: bool = True
) -> tuple[list[Reply], list[dict[str, int]]]:
    """Send requests together to a scheduler whose steps hold few tokens.

    Returns:
        The answers, and the tokens of each request in each step.
    """
    scheduler = scheduler_of(engine)
    before, original, steps = scheduler.max_num_scheduled_tokens, scheduler.schedule, []

    def schedule(*args: Any, **kwargs: Any) -> Any:
        scheduled = original(*args, **kwargs)
        steps.append(dict(scheduled.num_scheduled_tokens))
        return scheduled

    scheduler.max_num_scheduled_tokens, scheduler.schedule = most, schedule
    try:
        return ask(engine, asks, cold), [step for step in steps if step]
    finally:
        scheduler.max_num_scheduled_tokens, scheduler.schedule = before, original


def force(engine: LLM, one: Ask, whole: str) -> tuple[list[int], Tensor]:
    """Answer a prompt with the rest of a longer one, whatever the engine samples, and go on from there.

    Args:
        engine: in this process.
        one: the request; its `num_tokens` are those after the rest.
        whole: the longer prompt.

    Returns:
        Tokens after the longer prompt, and their log-probabilities (tokens, vocabulary).
    """
    tokenizer: Any = engine.get_tokenizer()
    before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in (one.prompt, whole))
    assert after[: len(before)] == before
    rest = after[len(before) :]
    runner, forced = worker_of(engine).model_runner, iter(rest)
    original = runner.sample

    def sample(*args: Any, **kwargs: Any) -> Any:
        output, *counts = original(*args, **kwargs)
        output.sampled_token_ids[0, 0] = next(forced, output.sampled_token_ids[0, 0])
        return output, *counts

    with _changed(runner, "sample", sample):
        (answer,) = ask(engine, [replace(one, num_tokens=len(rest) + one.num_tokens)])
    assert answer.tokens[: len(rest)] == rest
    return answer.tokens[len(rest) :], answer.logprobs[len(rest) :]


def chat(engine: LLM, turns: Sequence[tuple[str, Any]], num_tokens: int) -> list[tuple[Reply, Reply]]:
    """A chat with images, as a client sends it; each turn as it comes, and again without the cache.

    Args:
        engine: in this process.
        turns: text and image, or None.
        num_tokens: of each answer.
    """
    messages: list[dict[str, Any]] = []
    replies = []
    for text, image in turns:
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if image is not None:
            content.insert(0, {"type": "image_pil", "image_pil": image})
        messages.append({"role": "user", "content": content})
        params = Ask("", num_tokens=num_tokens)
        (output,) = engine.chat(messages, params.params(), use_tqdm=False)
        (again,) = engine.chat(messages, params.params(skip_reading_prefix_cache=True), use_tqdm=False)
        replies.append((_reply(output), _reply(again)))
        messages.append({"role": "assistant", "content": output.outputs[0].text})
    return replies


def reset(engine: LLM) -> bool:
    """Empty the prefix cache."""
    return bool(engine.reset_prefix_cache())


def evict_one(engine: LLM, segment: int, index: int) -> None:
    """Take one cached block out of the cache.

    Args:
        engine: whose cache has the blocks of one request.
        segment: to which the block belongs.
        index: of the block among the request's blocks there.
    """
    pool = scheduler_of(engine).kv_cache_manager.block_pool
    cached = [block for block in pool.blocks if block.block_hash is not None]
    of_segment = [block for block in cached if get_group_id(block.block_hash) == segment]
    pool._maybe_evict_cached_block(sorted(of_segment, key=lambda block: block.block_hash_num_tokens)[index])


def prefix_statistics(engine: LLM, asks: Sequence[Ask]) -> tuple[int, int]:
    """Tokens that vLLM's prefix cache looks up and finds for requests, one after the other."""
    manager = scheduler_of(engine).kv_cache_manager
    with _changed(manager, "log_stats", True), _changed(manager, "prefix_cache_stats", PrefixCacheStats()):
        ask_each(engine, asks)
        return manager.prefix_cache_stats.queries, manager.prefix_cache_stats.hits


def ask_mutant(engine: LLM, name: str, asks: Sequence[Ask]) -> tuple[list[Reply], list[Reply]]:
    """Send requests one after the other to an engine with a fault, from an empty cache; again without the cache."""
    reset(engine)
    with MUTANTS[name]():
        warm = ask_each(engine, asks)
        cold = ask_each(engine, asks, cold=True)
    reset(engine)
    return warm, cold


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _zeroed(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: torch.zeros_like(original(*args))


@contextmanager
def _without_rounding() -> Iterator[None]:
    planning._counts.cache_clear()
    with _changed(planning, "_in_multiples", lambda counts, *_: counts):
        yield
    planning._counts.cache_clear()


MUTANTS: dict[str, Callable[[], Any]] = {
    "window not hashed": lambda: _changed(scheduling, "mix_windows", lambda *_: None),
    "prefix keys zeroed": lambda: _changed(decoder, "cached_keys", _zeroed(cached_keys)),
    "no rounding": _without_rounding,
    "identity mapping": lambda: _changed(
        RequestPlan, "prompt_block", lambda self, segment, index, block: index
    ),
}


def _reply(output: Any) -> Reply:
    completion = output.outputs[0]
    rows = [[step[token].logprob for token in sorted(step)] for step in completion.logprobs or []]
    return Reply(
        list(completion.token_ids),
        torch.tensor(rows),
        len(output.prompt_token_ids or []),
        int(output.num_cached_tokens or 0),
    )
