"""The README's table, out of the benchmark's JSON."""

import json
from pathlib import Path
from typing import Any

from benchmarks.ttft import model, worker
from ficoco_vllm.reduction.cost import Budget, estimate, model_shape, plan_tokens, unreduced

RESULTS = Path(__file__).parent.parent / "results" / "ttft.json"
WHOLE_MODEL = 32


def kv_megabytes(keep: int | None) -> float:
    """KV cache of the prompt in the whole LLaVA-1.5-7B, fp16, decimal megabytes; None keeps all."""
    shape = model_shape(model.config(WHOLE_MODEL))
    plan = unreduced(shape) if keep is None else plan_tokens(shape, "ficoco-v", Budget(keep=keep))
    return estimate(shape, plan, num_text_tokens=worker.NUM_TEXT_TOKENS).kv_bytes / 1e6


def markdown(result: dict[str, Any]) -> str:
    """One row for each budget, of the run with the most decoder layers."""
    run = max(result["runs"], key=lambda run: run["layers"])
    machine = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if "vllm" in name)
    lines = [
        "| visual tokens | time to first token | speed-up | as FLOPs predict | KV cache of the prompt (7B, fp16) |",
        "|---|---|---|---|---|",
    ]
    for name, row in run["kinds"].items():
        keep = None if name == "stock" else int(name.removeprefix("keep-"))
        label = "576, stock vLLM" if keep is None else str(keep)
        lines.append(
            f"| {label} | {row['ttft_seconds_median']:.2f} s ({row['ttft_seconds_min']:.2f}-"
            f"{row['ttft_seconds_max']:.2f}) | {row['speedup']:.2f}x | {row['predicted_speedup']:.2f}x "
            f"| {kv_megabytes(keep):.0f} MB |"
        )
    lines += [
        "",
        f"`make bench-ttft`: LLaVA-1.5-7B's true shapes, random weights, {run['layers']} of 32 decoder layers, "
        f"{result['dtype']}, one image and {worker.NUM_TEXT_TOKENS} tokens of text, medians (min-max) of "
        f"{run['rounds']} rounds that take turns with stock vLLM; {machine['cores']} cores of an {machine['cpu']}, no "
        f"GPU; {versions}. The KV cache is the planner's figure.",
    ]
    return "\n".join(lines)


def committed() -> str:
    """The table of the committed figures."""
    return markdown(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    print(committed())
