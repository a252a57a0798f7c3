"""Scores of second answers."""

import asyncio
import math
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.sampling_params import RequestOutputKind

from ficoco_vllm.server.quality.answers import Answer, acceptance, same_text


def place(token: int, logprob: float) -> dict[int, Any]:
    """VLLM's log-probabilities at one place."""
    return {token: SimpleNamespace(logprob=logprob)}


def test_the_same_text_or_not() -> None:
    assert same_text(Answer(text="706"), Answer(text="706")) == 1
    assert same_text(Answer(text="706"), Answer(text="708")) == 0


def test_acceptance_against_whole_distributions() -> None:
    """Its expectation over drawn tokens is 1 minus the total variation distance, in float64."""
    generator = torch.Generator().manual_seed(0)
    q, p = torch.randn(2, 50, dtype=torch.float64, generator=generator).softmax(-1)
    expected = 0.0
    for token in range(50):
        drawn = Answer(token_ids=[token], logprobs=[q[token].log().item()])
        forced = Answer(prompt_logprobs=[None, place(token, p[token].log().item())])
        expected += q[token].item() * acceptance(drawn, forced)
    assert expected == pytest.approx(1 - 0.5 * (p - q).abs().sum().item(), abs=1e-12)


def test_acceptance_is_the_mean_over_the_tokens_at_the_end_of_the_prompt() -> None:
    drawn = Answer(token_ids=[5, 6], logprobs=[math.log(0.5), math.log(0.2)])
    places = [None, place(1, 0.0), place(5, math.log(0.25)), place(6, math.log(0.9))]
    assert acceptance(drawn, Answer(prompt_logprobs=places)) == pytest.approx((0.5 + 1) / 2)
    assert acceptance(Answer(), Answer()) == 1, "an empty answer has no token to refuse"
    with pytest.raises(ValueError, match="no log-probabilities"):
        acceptance(drawn, Answer(prompt_logprobs=places[:1]))
    with pytest.raises(ValueError, match="no log-probabilities"):
        acceptance(Answer(token_ids=[5]), Answer(prompt_logprobs=places))


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_outputs_are_handed_on_and_noted(kind: RequestOutputKind) -> None:
    pieces = [("7", [1], "7"), ("0", [2], "70"), ("6", [3], "706")]

    async def outputs() -> AsyncIterator[Any]:
        for number, (piece, ids, whole) in enumerate(pieces):
            delta = kind == RequestOutputKind.DELTA
            tokens = ids if delta else [1, 2, 3][: number + 1]
            yield SimpleNamespace(
                prompt_token_ids=[0] * 9,
                prompt_logprobs=None,
                outputs=[
                    SimpleNamespace(
                        text=piece if delta else whole,
                        token_ids=tokens,
                        logprobs=[place(token, -float(token)) for token in tokens],
                        finish_reason="stop" if number == 2 else None,
                    )
                ],
            )

    async def run() -> tuple[Answer, list[Any]]:
        answer = Answer()
        return answer, [output async for output in answer.watch(outputs(), kind)]

    answer, seen = asyncio.run(run())
    assert len(seen) == 3
    assert (answer.text, answer.token_ids, answer.logprobs) == ("706", [1, 2, 3], [-1.0, -2.0, -3.0])
    assert answer.is_complete
    assert answer.num_tokens == 12
