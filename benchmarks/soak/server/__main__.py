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
from functools import partial
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.harness.results import environment, make_parser, report, write
from ficoco_vllm.benchmarks.harness.serving import serving
from ficoco_vllm.benchmarks.soak.engine.mixture import METHODS
from ficoco_vllm.benchmarks.soak.server.bars import bars
from ficoco_vllm.benchmarks.soak.server.client import Client
from ficoco_vllm.benchmarks.soak.server.mixture import Target, make_requests
from ficoco_vllm.benchmarks.soak.server.run import Settings, run

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


def main() -> int:
    """Run, write the JSON, print the bars."""
    parser = make_parser(__doc__, "soak-server")
    add = parser.add_argument
    add("--servers", nargs="+", choices=METHODS_OF, default=list(METHODS_OF))
    add("--requests", type=int, default=10_000, help="to each (default: %(default)s)")
    add("--round", type=int, default=240, help="requests of a round (default: %(default)s)")
    add("--open", type=int, default=24, help="requests at the same time (default: %(default)s)")
    args = parser.parse_args()
    settings = Settings(args.requests, args.round, args.open)
    records = {method: serve_and_run(method, settings, args.seed) for method in args.servers}
    head = {"environment": environment(), "seed": args.seed, "options": OPTIONS, "malloc": MALLOC}
    write({**head, "servers": records}, args.out)
    for record in records.values():
        for line in (*record["faults"], *record["different"]):
            print(line, file=sys.stderr)
    return report(bar for method, record in records.items() for bar in bars(record, method))


def serve_and_run(method: str, settings: Settings, seed: int) -> dict[str, Any]:
    """Start a server with one method and send it all requests.

    Returns:
        The result of `run`.
    """
    target = Target(
        model="ficoco-demo",
        methods=METHODS_OF[method],
        budgets=(288, 64, 48),  # ToMe cannot reach 9 in the demo model's tower
        num_patches=576,
        max_images=2,
        max_body_bytes=MAX_BODY_MIB * 2**20,
        max_model_len=MAX_MODEL_LEN,
    )

    async def send(url: str, pid: int) -> dict[str, Any]:
        async with Client(url) as client:
            return await run(client, pid, make_requests(target, seed), settings, partial(print, flush=True))

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        arguments = ["--ficoco-method", method, "--ficoco-keep", "64", *OPTIONS]
        with serving(arguments, log, MALLOC) as served:
            return asyncio.run(send(served.url, served.process.pid))


if __name__ == "__main__":
    sys.exit(main())
