"""Microseconds that counting takes in the API server: of one output token, and of one request from end to end.

A batch of outputs goes through vLLM's own methods, with requests that are counted and with requests that are not.
"""

import time
from statistics import median
from types import SimpleNamespace
from typing import Any

NUM_RUNNING, NUM_STEPS, NUM_ROUNDS, NUM_REQUESTS = 64, 200, 7, 2000
CONFIG = SimpleNamespace(cache_config=SimpleNamespace(block_size=16))


def measure() -> dict[str, float]:
    """Medians over the rounds, in microseconds."""
    from ficoco_vllm.config import FicocoConfig
    from ficoco_vllm.hooks import request_metrics
    from ficoco_vllm.metrics.counting import BatchOutputs, CountedRequest, RequestCounter
    from ficoco_vllm.metrics.families import metrics
    from ficoco_vllm.metrics.savings import Account, Accountant
    from ficoco_vllm.planning.server import ServerPlan
    from ficoco_vllm.reduction.cost import KNOWN_MODELS, model_shape

    request_metrics.hook_request_metrics()
    meter = RequestCounter.__new__(RequestCounter)
    meter.metrics, meter.vllm_config = metrics(), CONFIG
    meter.model_name, meter.token_bytes, meter.only_engine = "m", 4096, "0"
    config = FicocoConfig.parse({"method": "ficoco-v", "keep": 64})
    shape = model_shape(KNOWN_MODELS["llava-hf/llava-1.5-7b-hf"])
    accountant = Accountant(ServerPlan.for_model(config, shape), shape)
    tower = accountant.plan.tower

    def account(num_text: int) -> Account:
        return accountant.account(num_text + 64, [(5, 64)], tower.default, None)

    account(60)
    tokens: dict[bool, list[float]] = {True: [], False: []}
    requests: list[float] = []
    for _ in range(NUM_ROUNDS):
        for counted in (True, False):
            tracked = CountedRequest(account(60), meter, "0") if counted else None
            tokens[counted].append(_steps(meter, tracked))
        start = time.perf_counter()
        for index in range(NUM_REQUESTS):
            request = CountedRequest(account(20 + index % 500), meter, "0")
            meter.record(BatchOutputs(first=[(request, 0.1)]), "0")
            meter.record(BatchOutputs(ended=[(request, "stop")]), "0")
        requests.append((time.perf_counter() - start) / NUM_REQUESTS * 1e6)
    with_ours, without = (median(tokens[counted]) for counted in (True, False))
    return {
        "token_microseconds": with_ours - without,
        "token_of_vllm_microseconds": without,
        "request_microseconds": median(requests),
    }


def _steps(meter: Any, tracked: Any) -> float:
    """Microseconds of one output in the batches of some steps, logged as vLLM's front end does."""
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.stats import IterationStats, RequestStateStats

    processor = OutputProcessor(None, log_stats=True)
    states = []
    for _ in range(NUM_RUNNING):
        state = SimpleNamespace(is_prefilling=False, stats=RequestStateStats(), lora_name=None)
        if tracked is not None:
            state.ficoco = tracked
        states.append(state)
    output = SimpleNamespace(new_token_ids=[1], events=None, prefill_stats=None, num_nans_in_logits=0)
    start = time.perf_counter()
    for step in range(NUM_STEPS):
        stats = IterationStats()
        for state in states:
            processor._update_stats_from_output(state, output, step * 0.02, stats)
        counted = getattr(stats, "ficoco", None)
        if counted is not None:
            meter.record(counted, "0")
    return (time.perf_counter() - start) / (NUM_STEPS * NUM_RUNNING) * 1e6
