"""`make bench-metrics`: the cost of our metrics in the front end, as a share of a request's CPU time.

vLLM's own objects count outputs and requests, with requests that we count and with others; no model runs. Two servers
beside each other, one without metrics, cannot show this cost: their noise is several percent.
"""

import os
import sys
import tempfile
import time
from statistics import median
from types import SimpleNamespace
from typing import Any

from ficoco_vllm.benchmarks.harness.results import at_most, environment, make_parser, report, write

LIMIT_PERCENT = 1.0
# A request of so many tokens to the demo model, and its CPU seconds on two cores of an AMD EPYC.
NUM_TOKENS, REQUEST_SECONDS = 16, 0.2126
NUM_RUNNING, NUM_STEPS, NUM_ROUNDS, NUM_REQUESTS = 64, 200, 7, 2000


def main() -> int:
    """Run the benchmark, write its JSON, print its bar."""
    args = make_parser(__doc__, "metrics", seed=False).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # before prometheus_client is imported
        hooks = measure()
    seconds = (hooks["request_microseconds"] + NUM_TOKENS * hooks["token_microseconds"]) / 1e6
    hooks["percent_of_a_request"] = 100 * seconds / REQUEST_SECONDS
    request = {"tokens": NUM_TOKENS, "cpu_seconds": REQUEST_SECONDS}
    write({"environment": environment(), "request": request, "hooks": hooks}, args.out)
    print(hooks)
    return report([at_most("metrics-hooks-percent", hooks["percent_of_a_request"], LIMIT_PERCENT)])


def measure() -> dict[str, float]:
    """Microseconds of one output token with and without our counting, and of counting one request; medians."""
    from ficoco_vllm.config import FicocoConfig
    from ficoco_vllm.hooks.request_metrics import hook_request_metrics
    from ficoco_vllm.metrics.counting import BatchOutputs, CountedRequest, RequestCounter
    from ficoco_vllm.metrics.families import metrics
    from ficoco_vllm.metrics.savings import SavingsPlanner
    from ficoco_vllm.planning.server import ServerPlan
    from ficoco_vllm.reduction.cost import KNOWN_MODELS, model_shape

    hook_request_metrics()
    config = FicocoConfig.parse({"method": "ficoco-v", "keep": 64})
    shape = model_shape(KNOWN_MODELS["llava-hf/llava-1.5-7b-hf"])
    savings_planner = SavingsPlanner(ServerPlan.for_model(config, shape), shape)
    counter = RequestCounter.__new__(RequestCounter)
    counter.metrics, counter.model_name, counter.token_bytes, counter.only_engine = metrics(), "m", 4096, "0"
    counter.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=16))

    def counted_request(num_text: int) -> CountedRequest:
        savings = savings_planner.compute(num_text + 64, [(5, 64)], savings_planner.plan.tower.default, None)
        return CountedRequest(savings, counter, "0")

    counted_request(60)
    tokens: dict[bool, list[float]] = {True: [], False: []}
    requests: list[float] = []
    for _ in range(NUM_ROUNDS):
        for counted in (True, False):
            tokens[counted].append(_steps(counter, counted_request(60) if counted else None))
        start = time.perf_counter()
        for index in range(NUM_REQUESTS):
            request = counted_request(20 + index % 500)
            counter.record(BatchOutputs(first=[(request, 0.1)]), "0")
            counter.record(BatchOutputs(ended=[(request, "stop")]), "0")
        requests.append((time.perf_counter() - start) / NUM_REQUESTS * 1e6)
    ours, vllm = (median(tokens[counted]) for counted in (True, False))
    return {
        "token_microseconds": ours - vllm,
        "token_of_vllm_microseconds": vllm,
        "request_microseconds": median(requests),
    }


def _steps(counter: Any, request: Any) -> float:
    """Microseconds of one output in the batches of some steps, logged as vLLM's front end does."""
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.stats import IterationStats, RequestStateStats

    processor = OutputProcessor(None, log_stats=True)
    state_of_ours = {} if request is None else {"ficoco": request}
    states = [
        SimpleNamespace(is_prefilling=False, stats=RequestStateStats(), lora_name=None, **state_of_ours)
        for _ in range(NUM_RUNNING)
    ]
    output = SimpleNamespace(new_token_ids=[1], events=None, prefill_stats=None, num_nans_in_logits=0)
    start = time.perf_counter()
    for step in range(NUM_STEPS):
        stats = IterationStats()
        for state in states:
            processor._update_stats_from_output(state, output, step * 0.02, stats)
        outputs = getattr(stats, "ficoco", None)
        if outputs is not None:
            counter.record(outputs, "0")
    return (time.perf_counter() - start) / (NUM_STEPS * NUM_RUNNING) * 1e6


if __name__ == "__main__":
    sys.exit(main())
