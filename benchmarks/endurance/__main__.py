"""`make soak`: 10,000 mixed requests against a real server, once reducing in the tower and once in the decoder.

The demo model behind `ficoco-vllm serve`, in a process of its own, with so small a KV cache that bursts must wait.
Images, text, methods and budgets by request, streams, clients that go away, broken and oversized input. Every request
must end in exactly one of: its whole answer, the refusal that it was sent for, its client's own going away. After each
round the server is empty: no blocks may be held then, and its memory must not keep growing. Questions of a sample must
be answered as when asked alone.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.bars import environment, report
from ficoco_vllm.benchmarks.endurance.asks import Target, make_asks
from ficoco_vllm.benchmarks.endurance.client import Client
from ficoco_vllm.benchmarks.endurance.drive import Settings, drive
from ficoco_vllm.benchmarks.endurance.promises import promises
from ficoco_vllm.benchmarks.soak.load import METHODS
from ficoco_vllm.server.lifecycle.process import serving

RESULTS = Path(__file__).parent.parent / "results" / "endurance.json"
TOWER, DECODER = "ficoco-v", "ficoco-l"
MAX_BODY_MIB, MAX_MODEL_LEN = 2, 2048
METHODS_OF = {TOWER: ("ficoco-v", "tome", "evit", "topk-cls"), DECODER: METHODS}
# Longest requests are two images that keep everything; the cache holds two of them. The demo model has 2,048 keys and
# values a token, of the type that `ficoco-vllm serve` computes it in.
KV_BYTES = 4096 * 2048 * 4  # float32, as the demo model is served on a CPU
OPTIONS = [
    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16"),
    *("--kv-cache-memory-bytes", str(KV_BYTES)),
    *("--limit-mm-per-prompt", '{"image": 2}', "--ficoco-max-body-mb", str(MAX_BODY_MIB)),
    *("--disable-uvicorn-access-log", "--no-enable-log-requests"),
]
# glibc's malloc keeps what was freed, and the more the larger the blocks that it has seen: one burst then looks like a
# leak. With a fixed threshold every block above it is given back to the system, and what remains is held by somebody.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**17)}


def main() -> int:
    """Run, write the JSON, print the bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", nargs="+", choices=METHODS_OF, default=list(METHODS_OF))
    parser.add_argument("--requests", type=int, default=10_000, help="to each (default: %(default)s)")
    parser.add_argument(
        "--round", type=int, default=240, help="requests between two looks (default: %(default)s)"
    )
    parser.add_argument("--open", type=int, default=24, help="requests at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    settings = Settings(args.requests, args.round, args.open)
    records = {method: run(method, settings, args.seed) for method in args.servers}
    result = {
        "environment": environment(),
        "seed": args.seed,
        "options": OPTIONS,
        "malloc": MALLOC,
        "servers": records,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    bars = [bar for method, record in records.items() for bar in promises(record, method)]
    for record in records.values():
        for line in (*record["faults"], *record["different"]):
            print(line, file=sys.stderr)
    return report(bars)


def run(method: str, settings: Settings, seed: int) -> dict[str, Any]:
    """Serve by one method and send it everything.

    Args:
        method: of the server.
        settings: of the run.
        seed: of the mixture.

    Returns:
        As `drive`.
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
            return await drive(
                client, pid, make_asks(target, seed), settings, lambda line: print(line, flush=True)
            )

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        arguments = ["--ficoco-method", method, "--ficoco-keep", "64", *OPTIONS]
        with serving(arguments, log, MALLOC) as served:
            return asyncio.run(send(served.url, served.process.pid))


if __name__ == "__main__":
    sys.exit(main())
