"""Answers of the engine to one request, and how well one agrees with the full model's."""

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.sampling_params import RequestOutputKind


@dataclass
class Answer:
    """One answer of the engine, as far as it has come.

    Attributes:
        num_prompt_tokens: number of tokens of its prompt.
        text: text of the answer.
        token_ids: tokens of the answer.
        logprobs: log-probability of each token under the model that generated it; empty where not requested.
        prompt_logprobs: for each token of the prompt, a map from token to vLLM's `Logprob`, where requested.
        is_complete: whether it ended by itself.
    """

    num_prompt_tokens: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: Sequence[Any] | None = None
    is_complete: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return self.num_prompt_tokens + len(self.token_ids)

    async def watch(self, outputs: AsyncIterator[Any], kind: RequestOutputKind) -> AsyncIterator[Any]:
        """Hand outputs on, and note the answer.

        Args:
            outputs: vLLM's `RequestOutput`s of a request for one answer.
            kind: whether an output holds all that has come before.
        """
        async for output in outputs:
            self._add(output, is_delta=kind == RequestOutputKind.DELTA)
            yield output

    def _add(self, output: Any, *, is_delta: bool) -> None:
        self.num_prompt_tokens = len(output.prompt_token_ids or ())
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        (answer,) = output.outputs
        if not is_delta:
            self.text, self.token_ids, self.logprobs = "", [], []
        ids = list(answer.token_ids)
        self.text += answer.text
        self.token_ids += ids
        if answer.logprobs:
            self.logprobs += [place[token].logprob for place, token in zip(answer.logprobs, ids, strict=True)]
        self.is_complete = answer.finish_reason in ("stop", "length")


def same_text(answer: Answer, full: Answer) -> float:
    """Agreement of two greedy answers: 1 where they are the same text, else 0."""
    return float(answer.text == full.text)


def acceptance(answer: Answer, forced: Answer) -> float:
    """Agreement of a sampled answer: the mean probability at which the full model would have accepted its tokens.

    A token that the reduced model sampled with probability q, and to which the full model assigns p, is accepted with
    probability min(1, p / q), as in speculative sampling. The expectation is 1 minus the total variation distance of
    the two distributions. The probabilities are those before temperature and masks.

    Args:
        answer: with the log-probabilities of its tokens.
        forced: of the full model, to the prompt that ends in the tokens of `answer`, with prompt log-probabilities.

    Raises:
        ValueError: without log-probabilities.

    Source: Leviathan, Kalman and Matias, ICML 2023, Eq. 1 and Theorem 3.5.
    """
    ids = answer.token_ids
    places = list(forced.prompt_logprobs or ())[-len(ids) :] if ids else []
    if len(places) != len(ids) or len(answer.logprobs) != len(ids):
        raise ValueError("the answer has no log-probabilities")
    ratios = [
        math.exp(min(0.0, place[token].logprob - sampled))
        for place, token, sampled in zip(places, ids, answer.logprobs, strict=True)
    ]
    return sum(ratios) / len(ratios) if ratios else 1.0
