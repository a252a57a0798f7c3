"""Request statistics of vLLM's front end, counted by reduction method.

vLLM's own statistics name no request, and a stat logger plugin would turn them on even where they were switched off
(`--disable-log-stats`). So the methods through which every request leaves the front end are wrapped: vLLM's state of a
request gets a `CountedRequest` (see `admission.py`), the statistics of a batch of outputs get a `BatchOutputs`, and
when vLLM logs those statistics, ours are counted, engine by engine.
"""

from dataclasses import replace
from typing import Any

from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager

from ficoco_vllm.hooks.wrapping import wrap
from ficoco_vllm.metrics.counting import BatchOutputs, RequestCounter


def hook_request_metrics() -> None:
    """Let vLLM's front end count by method. Idempotent."""
    wrap(OutputProcessor, "add_request", _add_request)
    wrap(OutputProcessor, "_update_stats_from_output", _update_from_output)
    wrap(OutputProcessor, "_update_stats_from_finished", _update_from_finished)
    wrap(OutputProcessor, "abort_requests", _abort_requests)
    wrap(StatLoggerManager, "__init__", _init_manager)
    wrap(StatLoggerManager, "record", _record)


def _add_request(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    original(self, request, *args, **kwargs)
    admitted = _ours(request.sampling_params)
    state = self.request_states.get(request.request_id)
    if admitted is not None and self.log_stats and state is not None and _ours(state) is None:
        state.ficoco = replace(admitted)  # several answers to one request are counted separately


def _update_from_output(
    original: Any, self: Any, state: Any, output: Any, timestamp: Any, stats: Any
) -> None:
    request = _ours(state)
    if request is None or stats is None:
        original(self, state, output, timestamp, stats)
        return
    num_first = len(stats.time_to_first_tokens_iter)
    original(self, state, output, timestamp, stats)
    if len(stats.time_to_first_tokens_iter) > num_first:
        if output.prefill_stats is not None:
            request.num_cached = output.prefill_stats.num_cached_tokens
        _outputs(stats).first.append((request, stats.time_to_first_tokens_iter[-1]))
    else:
        _outputs(stats).later.append((request, stats.inter_token_latencies_iter[-1]))


def _update_from_finished(original: Any, self: Any, state: Any, reason: Any, stats: Any) -> None:
    original(self, state, reason, stats)
    request = _ours(state)
    if request is not None and stats is not None:
        _outputs(stats).ended.append((request, str(reason)))


def _abort_requests(original: Any, self: Any, request_ids: Any, internal: bool) -> Any:
    before = dict(self.request_states)
    aborted = original(self, request_ids, internal)
    for request_id in aborted:
        request = _ours(before.get(request_id))
        if request is not None:
            request.counter.end(request, "abort")
    return aborted


def _init_manager(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    original(self, vllm_config, *args, **kwargs)
    self.ficoco = RequestCounter.of(vllm_config)
    if self.ficoco is not None:
        self.ficoco.begin(self.engine_indexes)


def _record(
    original: Any, self: Any, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any
) -> None:
    original(self, scheduler_stats, iteration_stats, *args, **kwargs)
    counter = _ours(self)
    if counter is None:
        return
    engine = str(args[1] if len(args) > 1 else kwargs.get("engine_idx") or 0)
    outputs = _ours(iteration_stats)
    if outputs is not None:
        counter.record(outputs, engine)
    if scheduler_stats is not None:
        counter.set_blocks_held(scheduler_stats.kv_cache_usage, engine)


def _ours(owner: Any) -> Any:
    """Our state of one of vLLM's objects, None where it has none."""
    return getattr(owner, "ficoco", None)


def _outputs(stats: Any) -> BatchOutputs:
    if _ours(stats) is None:
        stats.ficoco = BatchOutputs()
    outputs: BatchOutputs = stats.ficoco
    return outputs
