"""`make bench-elastic`: more arrivals than a fixed budget can serve, with and without `--ficoco-elastic`.

The demo model with a KV cache of 45 blocks of 32 tokens, so that memory and not compute limits how many requests run.
The benchmark first measures the throughput of the ceiling (576 tokens, no reduction) when enough requests wait; then
1.6 times as many (2.4 times in the short form) arrive (Poisson, seeded), once with requests that name the ceiling and
once with none that name a budget.
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.elastic.overload import LONG, SHORT, arguments, run
from ficoco_vllm.benchmarks.harness.results import Bar, at_most, environment, make_parser, report, write
from ficoco_vllm.benchmarks.harness.serving import serving


def main() -> int:
    """Run the benchmark, write its JSON, print its bars."""
    parser = make_parser(__doc__, "elastic")
    parser.add_argument("--short", action="store_true", help="about a minute, as in the tests")
    args = parser.parse_args()
    length = SHORT if args.short else LONG
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(arguments(length, num_servers=1), Path(folder) / "log") as server,
    ):
        result = asyncio.run(run(server.url, args.seed, length))
    head = {"environment": environment(), "seed": args.seed, "length": asdict(length)}
    write({**head, "result": result}, args.out)
    print(json.dumps(result, indent=2))
    return report(bars(result))


def bars(result: Mapping[str, Any]) -> list[Bar]:
    """The bars: the ceiling's queue grows without end, the elastic budget's does not."""
    early, late = (result["fixed"][f"{part}_ttft_seconds"] for part in ("early", "late"))
    growth, share = late / early, result["elastic"]["late_ttft_seconds"] / late
    return [Bar("elastic-fixed-ttft-growth", growth, 1.5), at_most("elastic-late-ttft-of-fixed", share, 0.5)]


if __name__ == "__main__":
    sys.exit(main())
