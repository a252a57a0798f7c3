"""One request, timed inside the process of its engine."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from ficoco_vllm.benchmarks.harness.device import span, synchronise
from ficoco_vllm.benchmarks.harness.engine import worker_of
from ficoco_vllm.benchmarks.ttft.models import request


def measure(engine: Any, keep: int | None, batch: int, seed: int) -> dict[str, float]:
    """Time one request, or `batch` together, from pixels to the first token; every image is new.

    The requests name `keep` visual tokens, unless it is None or the engine is stock vLLM's.

    Returns:
        `ttft_seconds`, `tower_seconds`, of these `reduction_seconds`, and `num_prompt_tokens`.
    """
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
    stock = not engine.llm_engine.vllm_config.additional_config
    budget = {} if stock or keep is None else {"ficoco_keep": keep}
    bodies = [request(engine, seed + index, **budget) for index in range(batch)]
    with _stopwatch(engine, stock) as seconds:
        start = time.perf_counter()
        output, *_ = engine.generate(bodies, params, use_tqdm=False)
        ttft = time.perf_counter() - start
    figures = {f"{name}_seconds": value for name, value in {"ttft": ttft, **seconds}.items()}
    return {**figures, "num_prompt_tokens": len(output.prompt_token_ids)}


@contextmanager
def _stopwatch(engine: Any, stock: bool) -> Iterator[dict[str, float]]:
    """Seconds in the vision tower (without the projector), and of these in its reductions.

    The reduction is everything that a stock tower does not do: scores from queries and keys, selection, merge. A GPU's
    work is timed by events in its stream; on a CPU a call has finished when it returns.
    """
    runner = worker_of(engine).model_runner
    model = runner.get_model()
    spans: dict[str, list[Callable[[], float]]] = {"tower": [], "reduction": []}
    seconds = dict.fromkeys(spans, 0.0)

    def timed(function: Any, key: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with span() as took:
                result = function(*args, **kwargs)
            spans[key].append(took)
            return result

        return call

    patches = [(getattr(model, "vision_tower", None) or model.visual, "forward", "tower")]
    if not stock:
        from ficoco_vllm.models import reducing_model
        from ficoco_vllm.vision import tower

        patches += [(reducing_model, "encode", "tower"), (tower, "_reduce", "reduction")]
    # A replayed graph calls none of these; it holds the projector, too.
    encoder = getattr(getattr(runner, "model_state", None), "encoder_runner", None)
    if (manager := getattr(encoder, "cudagraph_manager", None)) is not None:
        patches.append((manager, "_run_budget_graph", "tower"))
    with ExitStack() as stack:
        for owner, name, key in patches:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), key)))
        yield seconds
    synchronise()
    seconds |= {key: sum(took() for took in taken) for key, taken in spans.items()}
