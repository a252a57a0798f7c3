"""Engines in this process, and what tests ask of them."""

import ctypes
import gc
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from vllm import LLM, RequestOutput, SamplingParams

from ficoco_vllm.benchmarks.harness import engine as harness
from ficoco_vllm.benchmarks.harness.engine import phase_of, request, scheduler_of, worker_of

__all__ = ["phase_of", "request", "scheduler_of", "worker_of"]

PROMPT = "<s>USER: <image>\nwhat number is on the sign? ASSISTANT:"
TWO_IMAGES = "<s>USER: <image>\n<image>\nhow many signs are there? ASSISTANT:"
TEXT_ONLY = "<s>USER: is there a red sign? ASSISTANT:"
# At least 16,000 tokens of any model of the tests.
KV_CACHE_BYTES = 2**27
# Engines that a process keeps. Each takes some hundred megabytes, and two test workers have two such processes each.
MAX_ENGINES = 2


def make_engine(model: Path, ficoco: dict[str, Any] | None = None, **options: Any) -> LLM:
    """Start an engine, small enough that many fit beside each other; see `harness.engine.make_engine`.

    The variable FICOCO_TEST_BACKEND replaces the backend of the fused ops: "triton" runs any test of an engine with the
    kernels, on a GPU or, for methods of the decoder, in Triton's interpreter.
    """
    if ficoco is not None and (backend := os.environ.get("FICOCO_TEST_BACKEND")):
        ficoco = {**ficoco, "backend": backend}
    # conftest.py sets a gigabyte for engines without the option, which the variable would override here.
    space = os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    try:
        return harness.make_engine(model, ficoco, **({"kv_cache_memory_bytes": KV_CACHE_BYTES} | options))
    finally:
        if space is not None:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = space


class Engines:
    """The engines of a process, one of each kind; the few that were used last live on."""

    def __init__(self) -> None:
        self.of: dict[str, LLM] = {}

    def __enter__(self) -> Self:
        return self

    def get(self, model: Path, ficoco: dict[str, Any] | None = None, **options: Any) -> LLM:
        """The engine of this kind, started where it does not live; arguments as of `make_engine`."""
        kind = json.dumps([str(model), ficoco, options], sort_keys=True)
        engine = self.of.pop(kind, None)
        if engine is None:
            while len(self.of) >= MAX_ENGINES:
                self._drop(next(iter(self.of)))
            engine = make_engine(model, ficoco, **options)
        self.of[kind] = engine
        return engine

    def _drop(self, kind: str) -> None:
        """Free an engine's memory. vLLM's own shutdown would also take what all engines of a process share."""
        del self.of[kind]
        gc.unfreeze()  # vLLM freezes what an engine has made
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)

    def __exit__(self, *_: object) -> None:
        for engine in self.of.values():
            engine.llm_engine.engine_core.shutdown()


@dataclass
class Answer:
    """Greedy tokens, the length of the prompt, and log-probabilities (num_tokens, vocabulary)."""

    tokens: list[int]
    num_prompt_tokens: int
    logprobs: Tensor


# A request with its prompt, indices of its images, and its `mm_processor_kwargs`.
Question = tuple[str, list[int], dict[str, Any]]


@dataclass
class Answers:
    """Answers to questions, and the full name of the class of the model that gave them."""

    model_class: str
    answers: list[Answer]


def ask(engine: LLM, requests: Sequence[dict[str, Any]], num_tokens: int = 6) -> list[Answer]:
    """Send requests together, greedy, all log-probabilities."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=-1)
    return [_answer(output) for output in engine.generate(list(requests), params, use_tqdm=False)]


def ask_all(engine: LLM, images: Sequence[Image.Image], questions: Sequence[Question]) -> Answers:
    """Ask questions together, as `ask`."""
    requests = [request(prompt, [images[i] for i in indices], **more) for prompt, indices, more in questions]
    return Answers(engine.apply_model(model_class)[0], ask(engine, requests))


def _answer(output: RequestOutput) -> Answer:
    completion = output.outputs[0]
    rows = [[step[token].logprob for token in sorted(step)] for step in completion.logprobs or []]
    return Answer(list(completion.token_ids), len(output.prompt_token_ids or []), torch.tensor(rows))


def model_class(model: torch.nn.Module) -> str:
    """Full name of a model's class; a function of a module, so that it can be sent to a worker."""
    return f"{type(model).__module__}.{type(model).__name__}"
