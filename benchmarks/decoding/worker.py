"""Decoding steps of many running requests, timed on the host inside the process of their engine."""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from ficoco_vllm.benchmarks.harness.engine import image_request, scheduler_of, worker_of

NUM_TEXT_TOKENS = 60
NUM_WARM, NUM_STEPS = 8, 48


def decode(engine: Any, num_requests: int) -> dict[str, float]:
    """Decode with many requests, each with an image, and no model: its forward pass returns what it returned before.

    Returns:
        Milliseconds of the processor, medians over steps: `step`, all of it; `prepare_attn`, of the model state, with
        the block tables and slots of the model runner; `schedule`, the scheduler's.
    """
    from vllm import SamplingParams

    scheduler, runner = scheduler_of(engine), worker_of(engine).model_runner
    params = SamplingParams(
        max_tokens=NUM_WARM + NUM_STEPS + num_requests, temperature=0, ignore_eos=True, detokenize=False
    )
    names = engine.enqueue([image_request(engine, NUM_TEXT_TOKENS, 0)] * num_requests, params, use_tqdm=False)
    core = engine.llm_engine
    while sum(request.num_output_tokens > 0 for request in scheduler.running) < num_requests:
        core.step()
    seconds: dict[str, float] = defaultdict(float)
    steps: list[dict[str, float]] = []
    parts = [(runner.model_state, "prepare_attn"), (runner, "prepare_attn"), (scheduler, "schedule")]
    with ExitStack() as stack:
        for owner, name in parts:
            stack.enter_context(patch.object(owner, name, _timed(getattr(owner, name), seconds, name)))
        stack.enter_context(patch.object(runner.model, "forward", _recalled(runner.model.forward)))
        for _ in range(NUM_WARM + NUM_STEPS):
            seconds.clear()
            start = time.thread_time()
            core.step()
            steps.append({**seconds, "step": time.thread_time() - start})
    core.abort_request(list(names), internal=True)
    while core.has_unfinished_requests():
        core.step()
    core.step()
    return {key: 1000 * median(step[key] for step in steps[NUM_WARM:]) for key in steps[0]}


def _recalled(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A forward pass that is run once for each number of tokens."""
    results: dict[int, torch.Tensor] = {}

    def call(input_ids: Any, positions: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(positions) not in results:
            results[len(positions)] = forward(input_ids, positions, *args, **kwargs)
        return results[len(positions)]

    return call


def _timed(function: Callable[..., Any], seconds: dict[str, float], key: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        result = function(*args, **kwargs)
        seconds[key] += time.thread_time() - start
        return result

    return call
