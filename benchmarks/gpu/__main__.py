"""`make bench-gpu`: what a GPU host shows in one command.

Four steps, each in processes of its own; what one has measured is written before the next begins.

- answers: the demo model answers its example questions, stock, reducing in the tower, in the decoder.
- kernels: each fused op at LLaVA-1.5-7B's shapes against its floor, bytes over the measured bandwidth or FLOPs over the
  measured rate.
- serving: stock vLLM and ours with LLaVA-1.5-7B's shapes and made-up weights, or with `--model` a checkpoint: time to
  first token, time of the tower alone and in a batch, requests a second and requests at once in the same KV memory.
- steps: time of a decoding step, stock and FiCoCo-L with as many tokens.

`--emulate` runs every step's code on a machine without a GPU, on the demo model: its figures mean nothing.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from ficoco_vllm import demo_model
from ficoco_vllm.benchmarks.gpu import worker
from ficoco_vllm.benchmarks.harness import device, model
from ficoco_vllm.benchmarks.harness.engine import DECODE_GRAPHS, IN_PROCESS, Remote, bench_engine, remote
from ficoco_vllm.benchmarks.harness.results import Bar, at_most, environment, make_parser, report, write
from ficoco_vllm.benchmarks.harness.rounds import spread, take_turns
from ficoco_vllm.benchmarks.ttft import worker as ttft
from ficoco_vllm.benchmarks.ttft.kinds import (
    DECODER_KINDS,
    ENCODER_KINDS,
    KINDS,
    NUM_TEXT_TOKENS,
    PATCHES,
    SMALLEST,
    STOCK,
    Kind,
)
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.reduction.cost import Device, Times, model_shape, predict, unreduced
from ficoco_vllm.reduction.cost.memory import num_parameters, to_bytes
from ficoco_vllm.reduction.cost.roofline import MEMORY_SHARE

# Our class with the whole tower, which graphs replay as they replay the reducing ones: stock's own is launched.
NO_METHOD = Kind("no-method", {}, PATCHES)
# Engines that are compared, with the rows that each of them serves.
ENGINES: Sequence[Sequence[Kind]] = (
    (STOCK,),
    (NO_METHOD,),
    tuple(kind for kind in ENCODER_KINDS if kind.keep in (576, 192, 64)),
    *((kind,) for kind in DECODER_KINDS if not kind.name.endswith("one-shot")),
)
# Answers to the demo model's questions: with all tokens they must be right, with 64 a method may lose some.
ANSWERS: Mapping[str, tuple[dict[str, Any] | None, float]] = {
    "stock": (None, 1.0),
    "ficoco-v-576": ({"method": "ficoco-v", "keep": 576}, 1.0),
    "ficoco-l-576": ({"method": "ficoco-l", "keep": 576}, 1.0),
    "ficoco-v-64": ({"method": "ficoco-v", "keep": 64}, 0.5),
    "ficoco-l-64": ({"method": "ficoco-l", "keep": 64}, 0.5),
}
BATCH = 8  # images that the tower encodes together


def main() -> int:
    """Run the steps, write the JSON, print the bars."""
    parser = make_parser(__doc__, "gpu")
    add = parser.add_argument
    add("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    add("--model", help="a checkpoint (default: LLaVA-1.5-7B's shapes, weights made up)")
    add("--layers", type=int, default=model.WHOLE_MODELS["7b"], help="of the decoder, of made-up weights")
    add("--rounds", type=int, default=20, help="measured requests of each row")
    add("--requests", type=int, default=64, help="sent together for the throughput")
    add("--output-tokens", type=int, default=48, help="of each of these")
    add("--kv-gib", type=float, default=4.0, help="KV memory, the same for all")
    add("--batches", type=int, nargs="+", default=[1, 8, 32], help="of the kernels")
    add("--emulate", action="store_true", help="without a GPU: run the code, measure nothing")
    args = parser.parse_args()
    if device.name() == "cpu" and not args.emulate:
        parser.error("there is no GPU; --emulate runs the code of every step without one")
    if args.emulate:
        small = {"rounds": 1, "requests": 3, "output_tokens": 3, "kv_gib": 0.1, "batches": [1]}
        vars(args).update(small, model=str(demo_model.path()))
    ceilings = device.measure()
    result: dict[str, Any] = {
        "environment": environment(),
        "seed": args.seed,
        "model": args.model or f"LLaVA-1.5-7B's shapes, {args.layers} layers",
        "settings": {name: getattr(args, name) for name in ("rounds", "requests", "output_tokens", "kv_gib")},
        "emulated": args.emulate,
        "ceilings": asdict(ceilings),
        "failed": {},
    }
    for name in args.steps:
        try:
            for figures in STEPS[name](args, ceilings):
                result[name] = figures
                write(result, args.out)
        except RuntimeError as error:  # the other steps are worth their time all the same
            result["failed"][name] = str(error)
            print(f"{name} failed: {error}", file=sys.stderr)
            write(result, args.out)
    failed = at_most("gpu-steps-failed", len(result["failed"]))
    if args.emulate:
        print("emulated: the figures mean nothing")
    return report([failed] if args.emulate else [failed, *bars(result)])


def bars(result: Mapping[str, Any]) -> Iterator[Bar]:
    """The bars of the steps that have run."""
    for name, row in result.get("answers", {}).items():
        yield Bar(f"gpu-answers-{name}", row["num_right"] / row["num_asked"], ANSWERS[name][1])
    ceilings = result["ceilings"]
    for row in result.get("kernels", []):
        # One and a half times the floor; for a single item plus the latency of its launches.
        floor = max(row["floor_bytes"] / ceilings["bandwidth"], row["floor_flops"] / ceilings["flops"])
        most = 1.5 * floor + (row["num_launches"] * ceilings["launch_seconds"] if row["B"] == 1 else 0.0)
        yield at_most(f"gpu-kernel[{row['name']},B={row['B']}]", row["seconds"] / most, 1.0)
    yield from _serving_bars(result.get("serving", {}), result["settings"]["requests"])
    if steps := result.get("steps"):
        yield at_most("gpu-step-of-ficoco-l-over-stock", steps["ficoco-l-576"] / steps["stock"], 1.1)


def _serving_bars(rows: Mapping[str, Mapping[str, Any]], num_requests: int) -> Iterator[Bar]:
    if not {"stock", f"keep-{SMALLEST}"} <= rows.keys():
        return
    stock = rows["stock"]
    for name, row in rows.items():
        if name == NO_METHOD.name or KINDS[name].keep != SMALLEST:
            continue
        measured = stock["ttft_seconds"]["median"] / row["ttft_seconds"]["median"]
        predicted = stock["predicted"]["ttft_seconds"] / row["predicted"]["ttft_seconds"]
        yield Bar(f"gpu-ttft-{name}-of-roofline", measured / predicted, 0.9)
        measured = row["requests_per_second"] / stock["requests_per_second"]
        predicted = row["predicted"]["requests_per_second"] / stock["predicted"]["requests_per_second"]
        yield Bar(f"gpu-throughput-{name}-of-roofline", measured / predicted, 0.9)
        planned = min(num_requests, row["predicted"]["num_concurrent"])
        yield Bar(f"gpu-concurrent-{name}-of-plan", row["num_running"] / planned, 0.95)
    tower, whole = rows[f"keep-{SMALLEST}"], rows.get(NO_METHOD.name, stock)
    for which, limit in (("tower_seconds", 1.05), ("tower_batch_seconds", 1.0)):
        share = tower[which]["median"] / whole[which]["median"]
        yield at_most(f"gpu-{which.replace('_', '-')}-over-stock", share, limit)


def _answers(args: argparse.Namespace, ceilings: Device) -> Iterator[dict[str, Any]]:
    """All engines beside each other on a GPU, which has room for several demo models; a CPU has not."""

    def ask(ficoco: dict[str, Any] | None) -> dict[str, Any]:
        limits = {"max_model_len": 1024, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**28}
        with bench_engine(demo_model.path(), ficoco, load_format="auto", **limits) as engine:
            found: dict[str, Any] = engine.call(worker.answers)
        return found

    rows: dict[str, Any] = {}
    with ThreadPoolExecutor(1 if args.emulate else len(ANSWERS)) as pool:
        asked = {name: pool.submit(ask, ficoco) for name, (ficoco, _) in ANSWERS.items()}
        for name, answered in asked.items():
            rows[name] = answered.result()
            print(f"{name}: {rows[name]['num_right']} of {rows[name]['num_asked']} right", flush=True)
            yield rows


def _kernels(args: argparse.Namespace, ceilings: Device) -> Iterator[list[dict[str, Any]]]:
    variables = {"TRITON_INTERPRET": "1"} if args.emulate else {}
    with remote(nullcontext, {**IN_PROCESS, **variables}) as process:
        yield process.call(worker.kernels, args.batches, 1 if args.emulate else 50)


def _serving(args: argparse.Namespace, ceilings: Device) -> Iterator[dict[str, dict[str, Any]]]:
    """One engine after the other; each row has its own median and spread."""
    rows: dict[str, dict[str, Any]] = {}
    with _model(args) as (path, options):
        for kinds in ENGINES:
            with ExitStack() as stack:
                engine, has_graphs = _engine(stack, path, kinds, options)
                for kind in kinds:
                    times = _predicted(path, kind, ceilings, args)
                    rows[kind.name] = _measured(engine, kind, args) | {
                        "tower_graphs": has_graphs,
                        "predicted": {**asdict(times), "ttft_seconds": times.ttft_seconds},
                    }
                    print(kind.name, rows[kind.name], flush=True)
                    yield rows


def _measured(engine: Remote, kind: Kind, args: argparse.Namespace) -> dict[str, Any]:
    # A method of the decoder takes its budget from the server's settings.
    keep = None if kind.in_decoder or not kind.settings else kind.keep
    asks = {
        name: partial(engine.call, ttft.measure, keep, size) for name, size in (("one", 1), ("batch", BATCH))
    }
    samples = take_turns(asks, args.rounds, Random(args.seed), kind.name)
    for turn in range(2):  # the first one warms up
        load = engine.call(worker.load, keep, args.requests, args.output_tokens, args.seed + turn)
    return {
        "ttft_seconds": spread([sample["ttft_seconds"] for sample in samples["one"]]),
        "tower_seconds": spread([sample["tower_seconds"] for sample in samples["one"]]),
        "tower_batch_seconds": spread([sample["tower_seconds"] for sample in samples["batch"]]),
        "num_prompt_tokens": samples["one"][0]["num_prompt_tokens"],
        **load,
    }


def _engine(
    stack: ExitStack, path: str, kinds: Sequence[Kind], options: Mapping[str, Any]
) -> tuple[Remote, bool]:
    """The engine of some rows, on a GPU with graphs of the tower, unless it fails to start with them."""
    settings = kinds[0].settings
    if settings and not kinds[0].in_decoder:
        settings = {**settings, "graph_budgets": [kind.keep for kind in kinds]}
    if device.name() == "cuda":
        graphs = {"compilation_config": {**DECODE_GRAPHS, "cudagraph_mm_encoder": True}}
        try:
            engine = stack.enter_context(bench_engine(path, settings, **options, **graphs))
            return engine, settings is not None
        except RuntimeError as error:
            print(f"{kinds[0].name}: no graphs of the tower: {error}", file=sys.stderr)
    return stack.enter_context(bench_engine(path, settings, **options)), False


def _steps(args: argparse.Namespace, ceilings: Device) -> Iterator[dict[str, float]]:
    """Seconds of a decoding step with as many tokens: FiCoCo-L's, from which nothing leaves, against stock's."""
    seconds = {}
    with _model(args) as (path, options):
        for name, ficoco in (("stock", None), ("ficoco-l-576", {"method": "ficoco-l", "keep": 576})):
            with bench_engine(path, ficoco, **options) as engine:
                loads = [
                    engine.call(worker.load, None, min(args.requests, 8), args.output_tokens, turn)
                    for turn in range(3)
                ]
            seconds[name] = median(one["step_seconds"] for one in loads[1:])
    yield seconds


@contextmanager
def _model(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The model and the options of its engines."""
    options = {
        "load_format": "auto" if args.model else "dummy",
        "max_model_len": 1024,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 256,
        "kv_cache_memory_bytes": int(args.kv_gib * 2**30),
        "enable_prefix_caching": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        yield args.model or str(model.write(Path(folder), args.layers)), options


def _predicted(path: str, kind: Kind, ceilings: Device, args: argparse.Namespace) -> Times:
    """The roofline's times of one row, with the memory of the benchmark's KV cache."""
    from transformers import AutoConfig

    shape = model_shape(AutoConfig.from_pretrained(path).to_dict())
    plan = unreduced(shape)
    if kind.settings:
        config = FicocoConfig.model_validate({**kind.settings, "keep": kind.keep})
        plan = ServerPlan.for_model(config, shape).image_tokens()
    memory = (to_bytes(num_parameters(shape), "fp16") + args.kv_gib * 2**30) / MEMORY_SHARE
    given = replace(ceilings, memory_bytes=memory)
    return predict(shape, plan, given, num_text_tokens=NUM_TEXT_TOKENS, num_output_tokens=args.output_tokens)


STEPS: Mapping[str, Callable[[argparse.Namespace, Device], Iterator[Any]]] = {
    "answers": _answers,
    "kernels": _kernels,
    "serving": _serving,
    "steps": _steps,
}


if __name__ == "__main__":
    sys.exit(main())
