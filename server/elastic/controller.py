"""Control law of the load-following budget: a pure function from state and load to state.

docs/elastic.md explains why it is stable.
"""

import math
from dataclasses import dataclass, replace

from ficoco_vllm.server.elastic.settings import ElasticSettings
from ficoco_vllm.server.load.reports import Load

# Upper limit of the pressure: only the duration of an overload counts, not its queue length, or the budget would stay
# low long after it.
MAX_PRESSURE = 4.0


@dataclass(frozen=True)
class State:
    """State of the controller.

    Attributes:
        level: index of the budget, 0 is the floor.
        pressure: smoothed pressure; above 1 the budget falls.
        excess_seconds: integral of the pressure above 1 since the level changed or the pressure was below 1.
        time_seconds: time of the last report.
        changed_seconds: time of the last change of the level.
        calm_seconds: time since which the load leaves room for the next level.
        busy_seconds: last time with any request.
        hold_seconds: calm time required before the step up to each level.
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
    """Initial state: the ceiling, without load.

    Args:
        settings: settings of the controller.
        now_seconds: time on a monotonic clock.
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
    """Pressure of a load: the larger of KV demand and queue, each relative to its target.

    Returns:
        0 to `MAX_PRESSURE`.
    """
    demand = load.kv_usage * (1 + load.queue) / settings.target_kv_usage
    return min(MAX_PRESSURE, max(demand, load.queue / settings.target_queue))


def step(settings: ElasticSettings, state: State, load: Load, now_seconds: float) -> State:
    """Process one report of the load. The level changes by one at most.

    Args:
        settings: settings of the controller.
        state: state after the last report.
        load: current load.
        now_seconds: time on the clock of `state`; a report that is not newer than the last one changes nothing.
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
        state = replace(
            state, hold_seconds=_fresh(settings)
        )  # the longer hold times belong to a load that is over
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
    """Whether the load stays below its targets at the next higher level, whose pressure grows in proportion."""
    budgets = settings.budgets
    growth = budgets[min(level + 1, len(budgets) - 1)] / budgets[level]
    return pressure * growth <= 1 - settings.hysteresis


def _fall(settings: ElasticSettings, state: State) -> State:
    """One level down. The level at which a fall begins was too high: its hold time doubles if it was short-lived."""
    now, level, holds = state.time_seconds, state.level, list(state.hold_seconds)
    if not state.falling:
        premature = now - state.changed_seconds < settings.max_release_seconds
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
