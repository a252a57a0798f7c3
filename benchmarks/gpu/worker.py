"""Measurements inside the process of an engine, and of the kernels."""

import time
from statistics import median
from typing import Any

from PIL import Image

from ficoco_vllm import demo_model
from ficoco_vllm.benchmarks.harness import device
from ficoco_vllm.benchmarks.harness.engine import image_request, request, scheduler_of
from ficoco_vllm.benchmarks.ttft.kinds import NUM_TEXT_TOKENS


def answers(engine: Any) -> dict[str, Any]:
    """The demo model's answers to its example questions, and how many are right."""
    from vllm import SamplingParams

    examples = demo_model.examples()
    bodies = [
        request(f"<s>USER: <image>\n{one.question} ASSISTANT:", [Image.open(one.image).convert("RGB")])
        for one in examples
    ]
    outputs = engine.generate(bodies, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    given = [output.outputs[0].text.strip() for output in outputs]
    rows = [[example.question, example.answer, text] for example, text in zip(examples, given, strict=True)]
    return {"num_right": sum(right == text for _, right, text in rows), "num_asked": len(rows), "rows": rows}


def load(
    engine: Any, keep: int | None, num_requests: int, num_output_tokens: int, seed: int
) -> dict[str, float]:
    """Answer requests that are sent together, each with an image of its own; `keep` as in `ttft.worker.measure`.

    Returns:
        `requests_per_second`; `num_running`, the most at the same time; `step_seconds`, the median step in which all
        running requests decode.
    """
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=num_output_tokens, temperature=0, ignore_eos=True, detokenize=False)
    budget = {} if keep is None else {"ficoco_keep": keep}
    bodies = [image_request(engine, NUM_TEXT_TOKENS, seed + index, **budget) for index in range(num_requests)]
    core, scheduler = engine.llm_engine, scheduler_of(engine)
    steps, most = [], 0
    begin = time.perf_counter()
    engine.enqueue(bodies, params, use_tqdm=False)
    while core.has_unfinished_requests():
        decoding = all(one.num_output_tokens for one in scheduler.running) and bool(scheduler.running)
        start = time.perf_counter()
        core.step()
        if decoding:
            steps.append(time.perf_counter() - start)
        most = max(most, len(scheduler.running))
    seconds = time.perf_counter() - begin
    return {
        "requests_per_second": num_requests / seconds,
        "num_running": most,
        "step_seconds": median(steps) if steps else 0.0,
    }


def kernels(held: None, batches: list[int], repeats: int) -> list[dict[str, Any]]:
    """Median times of every fused op at LLaVA-1.5-7B's shapes, with its floors and its launches."""
    import torch
    from triton import knobs

    from ficoco_vllm.benchmarks.kernels.recording import launches_of
    from ficoco_vllm.benchmarks.kernels.workloads import workloads

    torch.manual_seed(0)
    rows = []
    for B in batches:
        # Launches are recorded on tensors without data: a recorded kernel does not run and writes no result.
        without_data = workloads(B, torch.bfloat16)
        for workload, recorded in zip(workloads(B, torch.bfloat16, device.name()), without_data, strict=True):
            times = []
            if device.name() == "cuda":
                workload.run()  # compiles
            for _ in range(repeats):
                device.synchronise()
                with device.span() as took:
                    workload.run()
                device.synchronise()
                times.append(took())
            rows.append(
                {
                    "name": workload.name,
                    "B": B,
                    "seconds": median(times),
                    "floor_bytes": workload.floor_bytes,
                    "floor_flops": workload.floor_flops,
                    # The interpreter, which launches nothing, counts as one.
                    "num_launches": 1 if knobs.runtime.interpret else len(launches_of(recorded.run)),
                }
            )
    return rows
