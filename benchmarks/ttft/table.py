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
    """One row for each budget: the deepest run, and the whole model that it extrapolates to."""
    run = max(result["runs"], key=lambda run: run["layers"])
    depths = " and ".join(str(run["layers"]) for run in result["runs"])
    machine = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if "vllm" in name)
    lines = [
        f"| visual tokens | {run['layers']} layers: time to first token | speed-up | FLOPs say "
        f"| {WHOLE_MODEL} layers (extrapolated): speed-up | FLOPs say | KV cache of the prompt |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in run["kinds"].items():
        keep = None if name == "stock" else int(name.removeprefix("keep-"))
        label = "576, stock vLLM" if keep is None else str(keep)
        whole = result["whole_model"][name]
        lines.append(
            f"| {label} | {row['ttft_seconds_median']:.2f} s ({row['ttft_seconds_min']:.2f}-"
            f"{row['ttft_seconds_max']:.2f}) | {row['speedup']:.2f}x | {row['predicted_speedup']:.2f}x "
            f"| {whole['speedup']:.2f}x | {whole['predicted_speedup']:.2f}x | {kv_megabytes(keep):.0f} MB |"
        )
    lines += [
        "",
        f"`make bench-ttft`: LLaVA-1.5-7B's true shapes, random weights, decoder cut to {depths} of {WHOLE_MODEL} "
        f"layers, {result['dtype']}, one image and {worker.NUM_TEXT_TOKENS} tokens of text; medians (min-max) of "
        f"{run['rounds']} rounds in which stock vLLM and ours take turns; {machine['cores']} cores of an "
        f"{machine['cpu']}, no GPU; {versions}. The KV cache (whole model, fp16) is the planner's figure.",
    ]
    return "\n".join(lines)


def committed() -> str:
    """The table of the committed figures."""
    return markdown(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    print(committed())
