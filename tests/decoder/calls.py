"""What tests run inside the process of the engine."""

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from vllm import LLM, SamplingParams

from tests.support.engine import Answer, request


@dataclass
class Ask:
    """One request: prompt, images, tokens to generate, `vllm_xargs` and `mm_processor_kwargs`."""

    prompt: str
    images: list[Image.Image] = field(default_factory=list)
    num_tokens: int = 4
    extra: dict[str, Any] = field(default_factory=dict)
    mm: dict[str, Any] = field(default_factory=dict)

    def params(self, **more: Any) -> SamplingParams:
        """Greedy, all log-probabilities."""
        return SamplingParams(
            temperature=0,
            max_tokens=self.num_tokens,
            ignore_eos=True,
            logprobs=-1,
            extra_args=self.extra or None,
            **more,
        )

    def body(self) -> dict[str, Any]:
        """The prompt as vLLM takes it."""
        return request(self.prompt, self.images, **self.mm)


def ask(engine: LLM, asks: list[Ask]) -> list[Answer]:
    """Send requests together."""
    outputs = engine.generate([one.body() for one in asks], [one.params() for one in asks], use_tqdm=False)
    answers = []
    for output in outputs:
        completion = output.outputs[0]
        rows = [[step[token].logprob for token in sorted(step)] for step in completion.logprobs or []]
        answers.append(
            Answer(list(completion.token_ids), len(output.prompt_token_ids or []), torch.tensor(rows))
        )
    return answers


def refusal(engine: LLM, one: Ask, **more: Any) -> str:
    """The message that a request is refused with; empty if it is answered."""
    try:
        engine.generate([one.body()], [one.params(**more)], use_tqdm=False)
    except ValueError as error:
        return str(error)
    return ""
