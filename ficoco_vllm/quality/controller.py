"""Control law of the budget that holds a target: a pure function from state and score to state.

docs/quality.md explains why it works.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ficoco_vllm.quality.evidence import (
    Tally,
    evidence_above,
    evidence_below,
    settled_alarm,
    updated_alarm,
)
from ficoco_vllm.quality.settings import QualitySettings

# Level of the alarm at which the budget returns to the top of the ladder: a server that just holds its target
# returns unnecessarily at most once in this many comparisons.
ALARM = 1000.0
# Factor over the level at which the alarm settles while all answers agree; above it there is a suspicion, and requests
# are compared more often until it is resolved.
SUSPICION = 1.5
# A rung below the served one that has failed is tried again after this many chosen requests; doubles with each failure.
FIRST_REST, LONGEST_REST = 32, 512
# Comparisons after which a rung that is neither good nor bad counts as failed while its mean does not pass the target,
# in units of those that a perfect rung needs.
PATIENCE = 8


@dataclass(frozen=True)
class Rung:
    """State of one budget.

    Attributes:
        tally: scores of the present trial.
        trial: number of the trial; each has a smaller error than the one before.
        rest: number of chosen requests of its class between its next failure and the next trial.
        rests_until: number of chosen requests of its class after which it may be tried again.
    """

    tally: Tally = field(default_factory=Tally)
    trial: int = 1
    rest: int = FIRST_REST
    rests_until: int = 0

    def failed(self, num_chosen: int) -> "Rung":
        """The rung after a trial that has failed."""
        rest = min(2 * self.rest, LONGEST_REST)
        return Rung(trial=self.trial + 1, rest=rest, rests_until=num_chosen + self.rest)

    def again(self) -> "Rung":
        """The rung, reset for other traffic."""
        return Rung(trial=self.trial + (self.tally.count > 0))


@dataclass(frozen=True)
class State:
    """State for one method and class of traffic.

    Attributes:
        served: index of the rung that requests without a budget get; the last one is the top.
        rungs: rungs of the ladder, ascending.
        alarm: alarm of the served rung, see `updated_alarm`.
        num_chosen: requests that were chosen so far.
        num_falls: times that the budget went back to the top.
    """

    served: int
    rungs: tuple[Rung, ...]
    alarm: tuple[float, ...] = ()
    num_chosen: int = 0
    num_falls: int = 0

    @property
    def top(self) -> int:
        """Index of the largest budget."""
        return len(self.rungs) - 1

    @property
    def alarm_level(self) -> float:
        """Mean of the alarm's entries."""
        return sum(self.alarm) / len(self.alarm) if self.alarm else 0.0

    def suspects(self, target: float) -> bool:
        """Whether the served budget may have become too small for a target, as after a disagreement."""
        return self.alarm_level >= SUSPICION * settled_alarm(target)


def start(settings: QualitySettings) -> State:
    """The state without any score: the top of the ladder.

    Args:
        settings: with a ladder.
    """
    num_rungs = len(settings.ladder or ())
    return State(num_rungs - 1, (Rung(),) * num_rungs)


def next_rungs(settings: QualitySettings, state: State, *, top_reduces: bool) -> tuple[int, ...]:
    """The rungs that the next comparison is of: the served one, and one below it that is to be tried.

    The full model's answer, which costs the most, serves for both.

    Args:
        settings: with a ladder.
        state: state of the class.
        top_reduces: whether the top of the ladder keeps fewer than all tokens, so that it can be compared as well.

    Returns:
        Their indices, ascending; empty where nothing needs to be compared.
    """
    watched = () if state.served == state.top and not top_reduces else (state.served,)
    tried = _candidate(settings, state)
    return watched if tried is None else (tried, *watched)


def record(settings: QualitySettings, state: State, scores: Sequence[tuple[int, float]]) -> State:
    """Process a request that was chosen.

    Args:
        settings: with a ladder.
        state: before it.
        scores: index of each rung that was compared with the full model, and its score of 0 to 1, the served rung
            first; empty where nothing was to be compared.
    """
    state = replace(state, num_chosen=state.num_chosen + 1)
    for index, score in scores:
        state = _score(settings, state, index, score)
    return state


def _score(settings: QualitySettings, state: State, index: int, score: float) -> State:
    target = settings.target_agreement
    rung = state.rungs[index]
    rung = replace(rung, tally=rung.tally.plus(score))
    state = replace(state, rungs=_with(state.rungs, index, rung))
    if index == state.served:
        state = replace(state, alarm=updated_alarm(state.alarm, score, target))
        # That is, the upper bound of `interval` lies below the target.
        is_below = evidence_below(rung.tally, target) >= math.log(2 / (1 - settings.confidence))
        if state.served < state.top and (state.alarm_level >= ALARM or is_below):
            return _fall(state)
        return state
    if index > state.served:
        return state
    needed = _needed(settings, rung.trial)
    if evidence_above(rung.tally, target) >= needed:
        return replace(state, served=index, alarm=())
    patience = PATIENCE * needed / -math.log(target)
    is_doubtful = rung.tally.count >= patience and rung.tally.mean <= target
    if evidence_below(rung.tally, target) >= needed or is_doubtful:
        return replace(state, rungs=_with(state.rungs, index, rung.failed(state.num_chosen)))
    return state


def _needed(settings: QualitySettings, trial: int) -> float:
    """Evidence that a decision on a rung requires. The errors of all rungs and trials add up to 1 - confidence."""
    share = (1 - settings.confidence) / len(settings.ladder or ())
    return math.log(trial * (trial + 1) / share)


def _candidate(settings: QualitySettings, state: State) -> int | None:
    """The rung below the served one that promises the most saved tokens for a comparison; the smallest of equals."""
    ladder = settings.ladder or ()
    target = settings.target_agreement

    def promise(index: int) -> float:
        rung = state.rungs[index]
        mean = (rung.tally.total + 1) / (rung.tally.count + 1)
        if mean <= target:
            return 0.0
        # Evidence grows by the divergence between mean and target with each comparison.
        growth = mean * math.log(mean / target)
        if mean < 1:
            growth += (1 - mean) * math.log((1 - mean) / (1 - target))
        missing = max(1.0, _needed(settings, rung.trial) - evidence_above(rung.tally, target))
        return (ladder[state.served] - ladder[index]) * growth / missing

    rested = [index for index in range(state.served) if state.rungs[index].rests_until <= state.num_chosen]
    return max(rested, key=promise, default=None)


def _fall(state: State) -> State:
    """Return to the top and reset the rungs, whose evidence describes other traffic."""
    rungs = [rung.again() for rung in state.rungs]
    rungs[state.served] = state.rungs[state.served].failed(state.num_chosen)
    return State(state.top, tuple(rungs), (), state.num_chosen, state.num_falls + 1)


def _with(rungs: tuple[Rung, ...], index: int, rung: Rung) -> tuple[Rung, ...]:
    return (*rungs[:index], rung, *rungs[index + 1 :])
