"""The README's table, out of the benchmark's JSON."""

import json
from pathlib import Path
from typing import Any

from benchmarks.ttft import model
from benchmarks.ttft.kinds import KINDS, NUM_TEXT_TOKENS, Kind, token_plan
from ficoco_vllm.reduction.cost import estimate, model_shape

RESULTS = Path(__file__).parent.parent / "results" / "ttft.json"
WHOLE_MODEL = 32
LABELS = {
    "stock": "stock vLLM, 576",
    "ficoco-l": "FiCoCo-L 64",
    "ficoco-l-one-shot": "FiCoCo-L 64, one-shot",
    "ficoco-vl": "FiCoCo-VL 64",
}


def kv_megabytes(kind: Kind) -> float:
    """KV cache of the prompt in the whole LLaVA-1.5-7B, fp16, decimal megabytes."""
    shape = model_shape(model.config(WHOLE_MODEL))
    plan = token_plan(kind, WHOLE_MODEL)
    return estimate(shape, plan, num_text_tokens=NUM_TEXT_TOKENS).kv_bytes / 1e6


def markdown(result: dict[str, Any]) -> str:
    """One row for each kind: the shallowest run, and the whole model that methods of the tower extrapolate to."""
    run = min(result["runs"], key=lambda run: run["layers"])
    depths = " and ".join(str(run["layers"]) for run in result["runs"])
    machine = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if "vllm" in name)
    lines = [
        f"| visual tokens | {run['layers']} layers: time to first token | speed-up | FLOPs say "
        f"| {WHOLE_MODEL} layers (extrapolated): speed-up | FLOPs say | KV cache of the prompt |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in run["kinds"].items():
        kind = KINDS[name]
        whole = result["whole_model"].get(name)
        far = f"{whole['speedup']:.2f}x | {whole['predicted_speedup']:.2f}x" if whole else "|"
        lines.append(
            f"| {LABELS.get(name, f'FiCoCo-V {kind.keep}')} | {row['ttft_seconds_median']:.2f} s "
            f"({row['ttft_seconds_min']:.2f}-{row['ttft_seconds_max']:.2f}) | {row['speedup']:.2f}x "
            f"| {row['predicted_speedup']:.2f}x | {far} | {kv_megabytes(kind):.0f} MB |"
        )
    lines += [
        "",
        f"`make bench-ttft`: LLaVA-1.5-7B's true shapes, random weights, decoder cut to {depths} of {WHOLE_MODEL} "
        f"layers, {result['dtype']}, one image and {NUM_TEXT_TOKENS} tokens of text; medians (min-max) of "
        f"{run['rounds']} rounds in which stock vLLM and ours take turns; {machine['cores']} cores of an "
        f"{machine['cpu']}, no GPU; {versions}. The KV cache (whole model, fp16) is the planner's figure.",
    ]
    schedules = [
        f"{LABELS[name]}: {', '.join(str(count) for count in row['visual_tokens']['decoder'])}"
        for name, row in run["kinds"].items()
        if KINDS[name].in_decoder
    ]
    if schedules:
        lines[-1] += f" Visual tokens in each of the {run['layers']} layers, {'; '.join(schedules)}."
    return "\n".join(lines)


def committed() -> str:
    """The table of the committed figures."""
    return markdown(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    print(committed())
