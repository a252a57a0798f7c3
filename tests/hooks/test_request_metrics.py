"""Metrics of vLLM's front end, without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import IterationStats, PrefillStats, RequestStateStats

from ficoco_vllm.hooks.request_metrics import hook_request_metrics
from ficoco_vllm.metrics.counting import BatchOutputs, CountedRequest, RequestCounter
from ficoco_vllm.metrics.families import Metrics
from ficoco_vllm.metrics.savings import Savings

pytestmark = pytest.mark.compat

BLOCK_SIZE = 16


@pytest.fixture
def counter() -> RequestCounter:
    """A counter with a separate registry."""
    made = RequestCounter.__new__(RequestCounter)
    made.metrics = Metrics(CollectorRegistry())
    made.model_name, made.method, made.only_engine = "m", "tome", "0"
    made.token_bytes = 10
    made.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=BLOCK_SIZE))
    hook_request_metrics()
    return made


def counted(counter: RequestCounter) -> CountedRequest:
    return CountedRequest(Savings("tome", 576, 64, (64,), (512, 512)), counter, "0")


def ended(counter: RequestCounter, outcome: str) -> float:
    return float(counter.metrics.requests.labels("m", "0", "tome", outcome)._value.get())


def test_hooks_are_set_once(counter: RequestCounter) -> None:
    before = [OutputProcessor.add_request, OutputProcessor.abort_requests, StatLoggerManager.record]
    hook_request_metrics()
    assert before == [
        OutputProcessor.add_request,
        OutputProcessor.abort_requests,
        StatLoggerManager.record,
    ]


def test_abort_of_a_request_with_two_answers_counts_two(counter: RequestCounter) -> None:
    """VLLM aborts the children through the same method, which must not count them twice."""
    processor = OutputProcessor(None, log_stats=True)
    children = [f"{index}_parent" for index in range(2)]
    for child in children:
        state = SimpleNamespace(external_req_id="parent", lora_name=None, queue=None, detokenizer=None)
        state.ficoco = counted(counter)
        processor.request_states[child] = state
        processor.external_req_ids["parent"].append(child)
    processor.parent_requests["parent"] = SimpleNamespace(child_requests=set(children))
    assert sorted(processor.abort_requests(["parent"], internal=True)) == children
    assert ended(counter, "abort") == 2
    processor.abort_requests(["parent", *children], internal=True)
    assert ended(counter, "abort") == 2


def test_a_prefill_counts_once_and_blocks_go_back(counter: RequestCounter) -> None:
    """A request whose prompt is reported twice (preempted before its first token is out) is one prefill."""
    request = counted(counter)
    for _ in range(2):
        counter.record(BatchOutputs(first=[(request, 0.5)]), "0")
    families = counter.metrics

    def value(family: Any, *labels: str) -> float:
        return float(family.labels("m", "0", "tome", *labels)._value.get())

    assert value(families.visual_tokens_in) == 576
    assert value(families.kv_tokens_avoided, "1") == 512
    assert value(families.kv_bytes_avoided, "1") == 5120
    assert value(families.kv_blocks_saved, "0") == 512 / BLOCK_SIZE
    counter.record(BatchOutputs(ended=[(request, "stop")]), "0")
    counter.end(request, "abort")  # too late
    assert value(families.kv_blocks_saved, "0") == 0
    assert (ended(counter, "stop"), ended(counter, "abort")) == (1, 0)


def test_what_the_prefix_cache_held_is_not_counted_again(counter: RequestCounter) -> None:
    """`test_metrics.py` has what is left; here from vLLM's first output of a request to the counters."""
    asked: list[Any] = []

    def of_rest(num_cached: int, savings: Savings, *prompt: Any) -> Savings:
        asked.append((num_cached, savings, *prompt))
        return Savings("tome")

    open_counter: Any = counter
    open_counter.savings_planner = SimpleNamespace(of_rest=of_rest)
    request = counted(counter)
    request.prompt = ("prompt",)
    whole, stats = request.savings, IterationStats()
    state: Any = SimpleNamespace(is_prefilling=True, stats=RequestStateStats(), lora_name=None)
    state.ficoco = request
    prefill = PrefillStats()
    prefill.set(num_prompt_tokens=636, num_local_cached_tokens=608, num_external_cached_tokens=0)
    output = EngineCoreOutput("id", [5], prefill_stats=prefill)
    OutputProcessor(None, log_stats=True)._update_stats_from_output(state, output, 1.0, stats)
    counter.record(vars(stats)["ficoco"], "0")
    assert asked == [(608, whole, "prompt")]
    assert counter.metrics.visual_tokens_in.labels("m", "0", "tome")._value.get() == 0


def test_a_request_that_never_ran_saves_nothing(counter: RequestCounter) -> None:
    request = counted(counter)
    counter.end(request, "abort")
    assert ended(counter, "abort") == 1
    assert counter.metrics.visual_tokens_in.labels("m", "0", "tome")._value.get() == 0
    assert counter.metrics.kv_blocks_saved.labels("m", "0", "tome", "0")._value.get() == 0
