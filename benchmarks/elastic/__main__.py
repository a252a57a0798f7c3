"""`make bench-elastic`: one server, more arrivals than a fixed budget can serve, with and without `--ficoco-elastic`.

The demo model with a KV cache of 45 blocks of 32 tokens, so that memory and not compute decides how many requests run
at once. First it is measured what the ceiling (576, no reduction) manages when there are always enough requests; then
1.6 times as many arrive (Poisson, seeded), once naming the ceiling and once naming no budget.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from openai import AsyncOpenAI

from ficoco_vllm.benchmarks.bars import Bar, environment, report
from ficoco_vllm.benchmarks.elastic.driver import Driver
from ficoco_vllm.benchmarks.elastic.overload import LONG, NUM_OUTPUT, SHORT, Result, arguments, overload
from tests.support.server import API_KEY, Server, serve

RESULTS = Path(__file__).parent.parent / "results" / "elastic.json"


def main() -> int:
    """Run the benchmark, write its JSON, print its bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="about a minute, as in the tests")
    parser.add_argument("--api-servers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    length = SHORT if args.short else LONG
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder) / "log", *arguments(length, args.api_servers), "--api-key", API_KEY) as server,
    ):
        result = asyncio.run(run(server, args.seed, args.short))
    record = {
        "environment": environment(),
        "seed": args.seed,
        "api_servers": args.api_servers,
        "length": asdict(length),
        "result": asdict(result),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(asdict(result), indent=2))
    return report(bars(result))


async def run(server: Server, seed: int, short: bool) -> Result:
    """The experiment on a running server."""
    length = SHORT if short else LONG
    async with AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=300
    ) as client:
        return await overload(Driver(client, "ficoco-demo", NUM_OUTPUT, seed), server.metric, length)


def bars(result: Result) -> list[Bar]:
    """What is promised: the ceiling queues without end, elastic does not, and it comes back."""
    fixed, elastic = result.fixed, result.elastic
    return [
        Bar("elastic-fixed-ttft-growth", fixed.late_ttft_seconds / fixed.early_ttft_seconds, 1.5),
        Bar(
            "elastic-late-ttft-of-fixed",
            elastic.late_ttft_seconds / fixed.late_ttft_seconds,
            0.5,
            at_least=False,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
