"""An engine in this process, and what tests ask of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import LLM, RequestOutput, SamplingParams

from ficoco_vllm.benchmarks.harness.engine import make_engine, phase_of, request, scheduler_of, worker_of

__all__ = ["make_engine", "phase_of", "request", "scheduler_of", "worker_of"]

PROMPT = "<s>USER: <image>\nwhat number is on the sign? ASSISTANT:"
TWO_IMAGES = "<s>USER: <image>\n<image>\nhow many signs are there? ASSISTANT:"
TEXT_ONLY = "<s>USER: is there a red sign? ASSISTANT:"


@dataclass
class Answer:
    """Greedy tokens, the length of the prompt, and log-probabilities (num_tokens, vocabulary)."""

    tokens: list[int]
    num_prompt_tokens: int
    logprobs: Tensor


def ask(engine: LLM, requests: Sequence[dict[str, Any]], num_tokens: int = 6) -> list[Answer]:
    """Send requests together, greedy, all log-probabilities."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=-1)
    return [_answer(output) for output in engine.generate(list(requests), params, use_tqdm=False)]


def _answer(output: RequestOutput) -> Answer:
    completion = output.outputs[0]
    rows = [[step[token].logprob for token in sorted(step)] for step in completion.logprobs or []]
    return Answer(list(completion.token_ids), len(output.prompt_token_ids or []), torch.tensor(rows))


def model_class(model: torch.nn.Module) -> str:
    """Full name of a model's class; a function of a module, so that it can be sent to a worker."""
    return f"{type(model).__module__}.{type(model).__name__}"
