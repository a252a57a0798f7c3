"""The control law of the load-following budget: state and load in, state out; the clock is an argument.

docs/elastic.md says why it is stable.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ficoco_vllm.server.elastic.settings import ElasticSettings

# Where pressure is cut off: how long an overload lasts must count, not how deep its queue is, or the budget would
# stay low long after.
MOST_PRESSURE = 4.0


@dataclass(frozen=True)
class Load:
    """What the engines report.

    Attributes:
        kv_usage: share of the KV cache that requests hold, 0 to 1.
        num_running: requests that hold KV blocks.
        num_waiting: requests that have been accepted and wait.
        num_preempted: requests that lost their blocks to others since the last report.
    """

    kv_usage: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    num_preempted: int = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.num_running + self.num_waiting == 0

    @property
    def queue(self) -> float:
        """Requests without room for each one that runs: how long they wait, in units of how long they will run."""
        return (self.num_waiting + self.num_preempted) / max(1, self.num_running)

    @classmethod
    def of_engines(cls, loads: Sequence["Load"]) -> "Load":
        """Several engines between which requests are balanced, as one."""
        if not loads:
            return cls()
        return cls(
            sum(load.kv_usage for load in loads) / len(loads),
            sum(load.num_running for load in loads),
            sum(load.num_waiting for load in loads),
            sum(load.num_preempted for load in loads),
        )


@dataclass(frozen=True)
class State:
    """What the controller remembers.

    Attributes:
        level: index of the budget, 0 is the floor.
        pressure: smoothed; 1 is where the budget falls.
        excess_seconds: pressure above 1, added up over the time since the level changed or pressure was below 1.
        time_seconds: of the last report.
        changed_seconds: when the level last changed.
        calm_seconds: since when the load would leave room for the next level.
        busy_seconds: when there last was anything to do.
        hold_seconds: how long it must be calm before the step up to each level.
        falling: whether the last step was down.
    """

    level: int
    pressure: float
    excess_seconds: float
    time_seconds: float
    changed_seconds: float
    calm_seconds: float
    busy_seconds: float
    hold_seconds: tuple[float, ...]
    falling: bool


def start(settings: ElasticSettings, now_seconds: float) -> State:
    """At the ceiling, without load.

    Args:
        settings: of the controller.
        now_seconds: of a clock that never goes back.
    """
    return State(
        level=len(settings.budgets) - 1,
        pressure=0.0,
        excess_seconds=0.0,
        time_seconds=now_seconds,
        changed_seconds=now_seconds,
        calm_seconds=now_seconds,
        busy_seconds=now_seconds,
        hold_seconds=_fresh(settings),
        falling=False,
    )


def measure(settings: ElasticSettings, load: Load) -> float:
    """The pressure of a load: the larger of KV demand and queue, each relative to its target.

    Returns:
        0 to `MOST_PRESSURE`.
    """
    demand = load.kv_usage * (1 + load.queue) / settings.target_kv_usage
    return min(MOST_PRESSURE, max(demand, load.queue / settings.target_queue))


def step(settings: ElasticSettings, state: State, load: Load, now_seconds: float) -> State:
    """One report of the load; the level moves by one at most.

    Args:
        settings: of the controller.
        state: after the last report.
        load: as it is now.
        now_seconds: of the clock of `state`; a report that is not newer than the last one changes nothing.
    """
    elapsed = now_seconds - state.time_seconds
    if elapsed <= 0:
        return state
    weight = -math.expm1(-elapsed / settings.attack_seconds)
    pressure = state.pressure + weight * (measure(settings, load) - state.pressure)
    busy = state.busy_seconds if load.idle else now_seconds
    room = _has_room(settings, state.level, pressure)
    state = replace(
        state,
        pressure=pressure,
        excess_seconds=state.excess_seconds + (pressure - 1) * elapsed if pressure > 1 else 0.0,
        time_seconds=now_seconds,
        calm_seconds=state.calm_seconds if room else now_seconds,
        busy_seconds=busy,
    )
    if now_seconds - busy >= settings.release_seconds:
        state = replace(state, hold_seconds=_fresh(settings))  # what was learnt concerned another load
    since_change = now_seconds - state.changed_seconds
    if state.level > 0 and min(state.excess_seconds, since_change) >= settings.attack_seconds:
        return _fall(settings, state)
    if state.level < len(settings.budgets) - 1:
        calm = min(since_change, now_seconds - state.calm_seconds)
        if calm >= state.hold_seconds[state.level + 1]:
            return replace(
                state, level=state.level + 1, excess_seconds=0.0, changed_seconds=now_seconds, falling=False
            )
    return state


def _fresh(settings: ElasticSettings) -> tuple[float, ...]:
    return (settings.release_seconds,) * len(settings.budgets)


def _has_room(settings: ElasticSettings, level: int, pressure: float) -> bool:
    """Whether the load would stay below its targets at the next higher level, which takes more in proportion."""
    budgets = settings.budgets
    growth = budgets[min(level + 1, len(budgets) - 1)] / budgets[level]
    return pressure * growth <= 1 - settings.hysteresis


def _fall(settings: ElasticSettings, state: State) -> State:
    """One level down. The level at which a fall begins was too high: it is tried again later than the last time."""
    now, level, holds = state.time_seconds, state.level, list(state.hold_seconds)
    if not state.falling:
        lasted = now - state.changed_seconds
        premature = lasted < settings.max_release_seconds
        holds[level] = (
            min(2 * holds[level], settings.max_release_seconds) if premature else settings.release_seconds
        )
    return replace(
        state,
        level=level - 1,
        excess_seconds=0.0,
        changed_seconds=now,
        hold_seconds=tuple(holds),
        falling=True,
    )
