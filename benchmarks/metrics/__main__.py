"""`make bench-metrics`: the cost of our metrics in the front end, as a share of a request's CPU time.

vLLM's own objects count outputs and requests with our hooks and without (`hooks.py`); no model runs. Two servers beside
each other, one without metrics, cannot show this cost: their noise is several percent.
"""

import os
import sys
import tempfile

from ficoco_vllm.benchmarks.harness.results import at_most, environment, make_parser, report, write
from ficoco_vllm.benchmarks.metrics.hooks import measure

LIMIT_PERCENT = 1.0
# A request of so many tokens to the demo model, and its CPU seconds on two cores of an AMD EPYC.
NUM_TOKENS, REQUEST_SECONDS = 16, 0.2126


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


if __name__ == "__main__":
    sys.exit(main())
