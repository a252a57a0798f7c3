"""`make bench-decoding`: host time of a decoding step with many requests, against stock vLLM's model runner V2.

Both engines run the real scheduler, model runner and sampler on the demo model. Its forward pass, which on a GPU runs
beside the host, is left out. Times are those of the processor, which other work of the machine does not change.
FiCoCo-L has eight KV lengths, stock has one.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ficoco_vllm import demo_model
from ficoco_vllm.benchmarks.decoding.worker import decode
from ficoco_vllm.benchmarks.harness.engine import bench_engine
from ficoco_vllm.benchmarks.harness.results import (
    Bar,
    at_most,
    environment,
    make_parser,
    print_table,
    report,
    write,
)

# Requests that decode together.
RUNNING = (1, 32, 256)
# Host time of a step over stock's with the most requests.
MOST_TIME = 1.15
KINDS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "ficoco-l": {"method": "ficoco-l", "keep": 64, "windows": "turn"},
}
ENGINE: dict[str, Any] = {
    "load_format": "auto",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 1024,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 256,
    "kv_cache_memory_bytes": 2**30,
}


def main() -> int:
    """Run the benchmark, write its JSON, print its bars."""
    args = make_parser(__doc__, "decoding", seed=False).parse_args()
    result: dict[str, Any] = {"environment": environment(), "kinds": {}}
    for name, settings in KINDS.items():
        with bench_engine(demo_model.path(), settings, "V2", **ENGINE) as engine:
            result["kinds"][name] = {str(count): engine.call(decode, count) for count in RUNNING}
    write(result, args.out)
    stock, ours = (result["kinds"][name] for name in KINDS)
    rows = [
        (f"{count} requests, {key}", f"{stock[count][key]:.3f}", f"{ms:.3f}", f"{ms / stock[count][key]:.2f}")
        for count, figures in ours.items()
        for key, ms in figures.items()
    ]
    print_table(("", "stock, ms", "ficoco-l, ms", "ratio"), rows)
    return report(bars(result))


def bars(result: Mapping[str, Any]) -> Iterator[Bar]:
    """A step takes hardly more time on the host than stock's."""
    stock, ours = (result["kinds"][name] for name in KINDS)
    most = max(ours, key=int)
    yield at_most(f"decoding-host-time-{most}-requests", ours[most]["step"] / stock[most]["step"], MOST_TIME)


if __name__ == "__main__":
    sys.exit(main())
