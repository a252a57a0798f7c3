"""Simulation of the control law on a log of requests whose answers at every budget are known."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ficoco_vllm.quality.allowance import Allowance
from ficoco_vllm.quality.controller import State, next_rungs, record, start
from ficoco_vllm.quality.settings import QualitySettings


@dataclass(frozen=True)
class Recorded:
    """One request of the log.

    Attributes:
        scores: score of its answer at each rung, against the full model's; 1 where a rung keeps all tokens.
        num_tokens: number of tokens of prompt and answer at each rung.
        num_full_tokens: the same with all tokens.
        traffic: its class.
    """

    scores: tuple[float, ...]
    num_tokens: tuple[int, ...]
    num_full_tokens: int
    traffic: str = ""


@dataclass(frozen=True)
class Move:
    """A change of the budget.

    Attributes:
        request: index of the request after which it happened.
        traffic: class.
        keep: visual tokens of an image from then on.
    """

    request: int
    traffic: str
    keep: int


@dataclass
class Replayed:
    """Outcome of a log.

    Attributes:
        moves: in order.
        scores: score of each request at the budget that it got.
        keeps: that budget.
        num_tokens: number of tokens of all first answers.
        num_second_tokens: tokens of all second answers.
        num_compared: requests that were answered a second time.
        settled: budget of each class after the last request.
    """

    moves: list[Move] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    keeps: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_second_tokens: int = 0
    num_compared: int = 0
    settled: dict[str, int] = field(default_factory=dict)

    @property
    def agreement(self) -> float:
        """Mean score of the answers that were served."""
        return sum(self.scores) / len(self.scores)

    @property
    def extra(self) -> float:
        """Tokens of second answers per token of first ones."""
        return self.num_second_tokens / self.num_tokens


def simulate(
    settings: QualitySettings,
    requests: Iterable[Recorded],
    *,
    top_reduces: bool = False,
    per_second: float = 10.0,
) -> Replayed:
    """Serve a log, one request after the other, with room for every second answer.

    Args:
        settings: with a ladder.
        requests: requests of the log.
        top_reduces: whether the top of the ladder keeps fewer than all tokens.
        per_second: rate of the requests, for the bound on tokens a minute.
    """
    ladder: Sequence[int] = settings.ladder or ()
    draw, allowance, outcome = random.Random(settings.seed), Allowance(settings, 0.0), Replayed()
    states: dict[str, State] = {}
    for number, request in enumerate(requests):
        state = states.get(request.traffic) or start(settings)
        served = state.served
        outcome.scores.append(request.scores[served])
        outcome.keeps.append(ladder[served])
        outcome.num_tokens += request.num_tokens[served]
        allowance.earn(request.num_tokens[served])
        suspects = state.suspects(settings.target_agreement)
        if draw.random() < allowance.share(number / per_second, suspects=suspects):
            rungs = next_rungs(settings, state, top_reduces=top_reduces)[::-1]
            state = record(settings, state, [(rung, request.scores[rung]) for rung in rungs])
            again = [request.num_tokens[rung] for rung in rungs if rung != served]
            if rungs and (served < len(ladder) - 1 or top_reduces):
                again.append(request.num_full_tokens)
            allowance.spend(sum(again), suspects=suspects)
            outcome.num_second_tokens += sum(again)
            outcome.num_compared += bool(rungs)
            if state.served != served:
                outcome.moves.append(Move(number, request.traffic, ladder[state.served]))
        states[request.traffic] = state
        outcome.settled[request.traffic] = ladder[state.served]
    return outcome
