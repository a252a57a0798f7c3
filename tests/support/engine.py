"""An engine in this process, and what tests ask of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from vllm import LLM, RequestOutput, SamplingParams
from vllm.v1.request import RequestStatus

PROMPT = "<s>USER: <image>\nwhat number is on the sign? ASSISTANT:"
TWO_IMAGES = "<s>USER: <image>\n<image>\nhow many signs are there? ASSISTANT:"
TEXT_ONLY = "<s>USER: is there a red sign? ASSISTANT:"


def make_engine(model: Path, ficoco: dict[str, Any] | None = None, **options: Any) -> LLM:
    """Start an engine in float32, small enough that several fit beside each other."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 16,
        "max_logprobs": -1,
        "limit_mm_per_prompt": {"image": 2},
        "seed": 0,
        "disable_log_stats": True,
    }
    return LLM(str(model), additional_config={"ficoco": ficoco} if ficoco else {}, **(defaults | options))


@dataclass
class Answer:
    """Greedy tokens, the length of the prompt, and log-probabilities (num_tokens, vocabulary)."""

    tokens: list[int]
    num_prompt_tokens: int
    logprobs: Tensor


def request(prompt: str, images: Sequence[Image.Image] = (), **kwargs: Any) -> dict[str, Any]:
    """One request; `kwargs` are its `mm_processor_kwargs`."""
    body: dict[str, Any] = {"prompt": prompt}
    if images:
        body["multi_modal_data"] = {"image": list(images)}
    if kwargs:
        body["mm_processor_kwargs"] = kwargs
    return body


def ask(engine: LLM, requests: Sequence[dict[str, Any]], num_tokens: int = 6) -> list[Answer]:
    """Send requests together, greedy, all log-probabilities."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=-1)
    return [_answer(output) for output in engine.generate(list(requests), params, use_tqdm=False)]


def _answer(output: RequestOutput) -> Answer:
    completion = output.outputs[0]
    rows = [[step[token].logprob for token in sorted(step)] for step in completion.logprobs or []]
    return Answer(list(completion.token_ids), len(output.prompt_token_ids or []), torch.tensor(rows))


def scheduler_of(engine: LLM) -> Any:
    """The scheduler of the engine's core."""
    return engine.llm_engine.engine_core.engine_core.scheduler


def phase_of(found: Any) -> str:
    """What a request of the scheduler is doing; "ended" for None."""
    if found is None:
        return "ended"
    if found.status == RequestStatus.PREEMPTED:
        return "preempted"
    if found.status != RequestStatus.RUNNING:
        return "waiting"
    return "decoding" if found.num_output_tokens else "prefilled"


def worker_of(engine: LLM) -> Any:
    """The worker in the engine's process."""
    worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return getattr(worker, "worker", worker)


def model_class(model: torch.nn.Module) -> str:
    """Full name of a model's class; a function of a module, so that it can be sent to a worker."""
    return f"{type(model).__module__}.{type(model).__name__}"
