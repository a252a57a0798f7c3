"""`make soak`: 10,000 mixed requests to a real server, once reducing in the tower and once in the decoder.

`ficoco-vllm serve` with the demo model, in a process of its own, and a KV cache so small that bursts must wait. Images,
text, methods and budgets by request, streams, clients that disconnect, broken and oversized input. Every request must
end in exactly one of: its whole answer, the refusal that it was sent for, the disconnect of its own client. After each
round the server is idle: then no block may be held, and its memory must not keep growing. Questions of a sample must be
answered as when they are sent alone.
"""

import asyncio
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.harness.results import Bar, at_most, environment, make_parser, report, write
from ficoco_vllm.benchmarks.harness.serving import serving
from ficoco_vllm.benchmarks.soak.engine.mixture import METHODS
from ficoco_vllm.benchmarks.soak.growth import growth_bars
from ficoco_vllm.benchmarks.soak.server.client import ABORTED, ANSWERED, FAULTS, REFUSED, Client
from ficoco_vllm.benchmarks.soak.server.mixture import EARLY, MID, Target, make_requests
from ficoco_vllm.benchmarks.soak.server.run import FINISHED, GAUGES, OUTCOMES, RESPONSES, run

TOWER, DECODER = "ficoco-v", "ficoco-l"
MAX_BODY_MIB, MAX_MODEL_LEN = 2, 2048
METHODS_OF = {TOWER: ("ficoco-v", "tome", "evit", "topk-cls"), DECODER: METHODS}
# Longest requests are two images that keep everything; the cache holds two of them. The demo model has 2,048 keys and
# values a token, of the type that `ficoco-vllm serve` computes it in.
KV_BYTES = 4096 * 2048 * 4  # float32
OPTIONS = [
    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16"),
    *("--kv-cache-memory-bytes", str(KV_BYTES)),
    *("--limit-mm-per-prompt", '{"image": 2}', "--ficoco-max-body-mb", str(MAX_BODY_MIB)),
    *("--disable-uvicorn-access-log", "--no-enable-log-requests"),
]
# glibc's malloc keeps freed memory, and more of it the larger the blocks it has seen: one burst then looks like a leak.
# With a fixed threshold every larger block goes back to the system when it is freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
# MiB for a thousand requests. A leak would show as 420 for a request's pixels (192 x 192 x 3 floats, 432 KiB), 280
# for its embeddings (576 x 128 floats, 288 KiB), 4 for its body (4 KiB), more with an image of 2 MiB.
MOST_GROWTH_MIB = 8.0


def main() -> int:
    """Run, write the JSON, print the bars."""
    parser = make_parser(__doc__, "soak-server")
    add = parser.add_argument
    add("--servers", nargs="+", choices=METHODS_OF, default=list(METHODS_OF))
    add("--requests", type=int, default=10_000, help="to each (default: %(default)s)")
    args = parser.parse_args()
    records = {
        method: asyncio.run(serve_and_run(method, args.requests, args.seed)) for method in args.servers
    }
    head = {"environment": environment(), "seed": args.seed, "options": OPTIONS, "malloc": MALLOC}
    write({**head, "servers": records}, args.out)
    for record in records.values():
        for line in (*record["faults"], *record["different"]):
            print(line, file=sys.stderr)
    return report(bar for method, record in records.items() for bar in bars(record, method))


async def serve_and_run(method: str, num_requests: int, seed: int) -> dict[str, Any]:
    """Start a server with one method and send it all requests; see `run` for the result."""
    target = Target(
        model="ficoco-demo",
        methods=METHODS_OF[method],
        budgets=(288, 64, 48),  # ToMe cannot reach 9 in the demo model's tower
        num_patches=576,
        max_images=2,
        max_body_bytes=MAX_BODY_MIB * 2**20,
        max_model_len=MAX_MODEL_LEN,
    )
    arguments = ["--ficoco-method", method, "--ficoco-keep", "64", *OPTIONS]
    with tempfile.TemporaryDirectory() as folder, serving(arguments, Path(folder) / "log", MALLOC) as served:
        async with Client(served.url) as client:
            return await run(client, served.process.pid, make_requests(target, seed), num_requests)


def bars(record: Mapping[str, Any], name: str) -> list[Bar]:
    """The bars of a run."""
    ended, rounds, prefix = record["outcomes"], record["rounds"], f"soak-{name}-"
    ends = sum(ended.get(kind, 0) for kind in (ANSWERED, REFUSED, ABORTED))
    held = {gauge: max(row["gauges"][gauge] for row in rounds) for gauge in GAUGES}
    return [
        *(at_most(prefix + fault, ended.get(fault, 0)) for fault in FAULTS),
        Bar(f"{prefix}ended", ends, record["num_requests"]),
        *(Bar(f"{prefix}aborts-{when}", record["aborts"].get(when, 0), 1) for when in (EARLY, MID)),
        *_counters(record, prefix),
        *(at_most(prefix + gauge.split(":")[1].replace("_", "-"), value) for gauge, value in held.items()),
        Bar(f"{prefix}longest-queue-of-a-burst", record["longest_queue"], 1),
        at_most(f"{prefix}answers-unlike-alone", len(record["different"])),
        Bar(f"{prefix}answers-compared", record["num_compared"], 1),
        *growth_bars(f"{prefix}growth-mib-per-1000-requests", rounds, "mib", MOST_GROWTH_MIB),
    ]


def _counters(record: Mapping[str, Any], prefix: str) -> Iterator[Bar]:
    """The server's own counters add up to what its clients saw.

    A request whose client disconnected may have ended before the server noticed, and then counts as answered; one that
    the server had not read counts nowhere.
    """
    ended, counted = record["outcomes"], record["counted"]
    answered, refused, aborted = (ended.get(kind, 0) for kind in (ANSWERED, REFUSED, ABORTED))
    for counter in (FINISHED, OUTCOMES):
        counts, name = counted[counter], prefix + counter.partition(":")[0]
        done = sum(counts.get(reason, 0) for reason in ("stop", "length"))
        left = counts.get("abort", 0)
        yield Bar(f"{name}-counts-answers", done, answered)
        yield at_most(f"{name}-counts-answers-and-aborts", done + left, answered + aborted)
        others = sum(counts.values()) - done - left - counts.get("refused", 0)
        yield at_most(f"{name}-counts-others", others)
    miscounted = abs(counted[OUTCOMES].get("refused", 0) - record["refusals"])
    yield at_most(f"{prefix}ficoco-refusals-miscounted", miscounted)
    yield at_most(f"{prefix}responses-5xx", counted[RESPONSES].get("5xx", 0))
    # vLLM records 400 for a client that disconnects before its answer begins.
    errors = counted[RESPONSES].get("4xx", 0)
    yield Bar(f"{prefix}responses-4xx", errors, refused)
    yield at_most(f"{prefix}responses-4xx-unexpected", errors - refused - aborted)


if __name__ == "__main__":
    sys.exit(main())
