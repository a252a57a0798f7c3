"""What vLLM's front end knows of requests, counted by reduction method.

vLLM's own statistics name no request, and a stat logger plugin would turn them on even where they were switched off
(`--disable-log-stats`). So the methods of the front end through which every request goes are wrapped, as
`kv/admission.py` does it: a request gets its account as it is admitted, what vLLM measures of it is noted beside
that, and the step in which vLLM logs its statistics logs ours, engine by engine.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager

from ficoco_vllm.metrics.counting import Meter, Step, Tracked

# Attributes that our objects take on vLLM's.
_ACCOUNT = "ficoco_account"
_METER = "ficoco_meter"
_REQUEST = "ficoco_request"
_STEP = "ficoco_step"


def hook_front_end() -> None:
    """Let vLLM's front end count by method; may run many times."""
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(OutputProcessor, "add_request", _add_request)
    _wrap(OutputProcessor, "_update_stats_from_output", _update_from_output)
    _wrap(OutputProcessor, "_update_stats_from_finished", _update_from_finished)
    _wrap(OutputProcessor, "abort_requests", _abort_requests)
    _wrap(StatLoggerManager, "__init__", _init_manager)
    _wrap(StatLoggerManager, "record", _record)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if hasattr(original, _METER):
        return

    @wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(wrapper, _METER, True)
    setattr(owner, name, wrapper)


def _process_inputs(original: Any, self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(self, request_id, prompt, *args, **kwargs)
    if _METER not in vars(self):
        setattr(self, _METER, Meter.of(self.vllm_config))
    meter = getattr(self, _METER)
    if meter is not None and request.sampling_params is not None:
        # The parameters are the request's own copy; children of a request with several answers share them.
        setattr(request.sampling_params, _ACCOUNT, (meter, meter.account(prompt, request)))
    return request


def _add_request(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    original(self, request, *args, **kwargs)
    found = getattr(request.sampling_params, _ACCOUNT, None)
    state = self.request_states.get(request.request_id)
    if found is not None and self.log_stats and state is not None and not hasattr(state, _REQUEST):
        meter, account = found
        setattr(state, _REQUEST, Tracked(account, meter, meter.only_engine))


def _update_from_output(
    original: Any, self: Any, state: Any, output: Any, timestamp: Any, stats: Any
) -> None:
    tracked = getattr(state, _REQUEST, None)
    if tracked is None or stats is None:
        original(self, state, output, timestamp, stats)
        return
    num_first = len(stats.time_to_first_tokens_iter)
    original(self, state, output, timestamp, stats)
    if len(stats.time_to_first_tokens_iter) > num_first:
        _step_of(stats).first.append((tracked, stats.time_to_first_tokens_iter[-1]))
    else:
        _step_of(stats).later.append((tracked, stats.inter_token_latencies_iter[-1]))


def _update_from_finished(original: Any, self: Any, state: Any, reason: Any, stats: Any) -> None:
    original(self, state, reason, stats)
    tracked = getattr(state, _REQUEST, None)
    if tracked is not None and stats is not None:
        _step_of(stats).ended.append((tracked, str(reason)))


def _abort_requests(original: Any, self: Any, request_ids: Any, internal: bool) -> Any:
    before = dict(self.request_states)
    aborted = original(self, request_ids, internal)
    for request_id in aborted:
        tracked = getattr(before.get(request_id), _REQUEST, None)
        if tracked is not None:
            tracked.meter.end(tracked, "abort")
    return aborted


def _init_manager(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    original(self, vllm_config, *args, **kwargs)
    meter = Meter.of(vllm_config)
    setattr(self, _METER, meter)
    if meter is not None:
        meter.begin(self.engine_indexes)


def _record(
    original: Any, self: Any, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any
) -> None:
    original(self, scheduler_stats, iteration_stats, *args, **kwargs)
    meter = getattr(self, _METER, None)
    if meter is None:
        return
    engine = str(args[1] if len(args) > 1 else kwargs.get("engine_idx") or 0)
    step = getattr(iteration_stats, _STEP, None)
    if step is not None:
        meter.record(step, engine)
    if scheduler_stats is not None:
        meter.hold_blocks(scheduler_stats.kv_cache_usage, engine)


def _step_of(stats: Any) -> Step:
    step: Step | None = getattr(stats, _STEP, None)
    if step is None:
        step = Step()
        setattr(stats, _STEP, step)
    return step
