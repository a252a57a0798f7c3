"""Requests that run at the same time, counted inside the process of their engine."""

from typing import Any

from ficoco_vllm.benchmarks.harness.engine import image_request, scheduler_of

NUM_TEXT_TOKENS = 60
NUM_DECODED = 48
MOST_REQUESTS = 256
# More than a prompt that does not fit: a step whose token budget is used up admits no request either.
_STEPS_WITHOUT_GROWTH = 3


def fill(engine: Any) -> int:
    """Requests that run at the same time: each has an image of its own, and one more must wait for blocks."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=NUM_DECODED, temperature=0, ignore_eos=True, detokenize=False)
    requests = [image_request(engine, NUM_TEXT_TOKENS, seed) for seed in range(MOST_REQUESTS)]
    engine.enqueue(requests, params, use_tqdm=False)
    scheduler = scheduler_of(engine)
    most, steps_without_growth = 0, 0
    while steps_without_growth < _STEPS_WITHOUT_GROWTH and engine.llm_engine.has_unfinished_requests():
        engine.llm_engine.step()
        num_running = len(scheduler.running)
        steps_without_growth = 0 if num_running > most else steps_without_growth + 1
        most = max(most, num_running)
    return most
