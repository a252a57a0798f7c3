"""One request, timed inside the process of its engine."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from ficoco_vllm.benchmarks.harness.engine import image_request, worker_of
from ficoco_vllm.benchmarks.ttft.kinds import NUM_TEXT_TOKENS


def measure(engine: Any, keep: int | None, seed: int) -> dict[str, float]:
    """Time one request with a new image, from pixels to the first token.

    Args:
        engine: in this process.
        keep: visual tokens that the request names, unless the engine is stock vLLM's; None names none.
        seed: of the image.

    Returns:
        `ttft_seconds`, `tower_seconds`, of these `reduction_seconds`, `decoder_reduction_seconds`, and
        `num_prompt_tokens`.
    """
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
    stock = not engine.llm_engine.vllm_config.additional_config
    budget = {} if stock or keep is None else {"ficoco_keep": keep}
    body = image_request(engine, NUM_TEXT_TOKENS, seed, **budget)
    with _stopwatch(engine, stock) as seconds:
        start = time.perf_counter()
        (output,) = engine.generate([body], params, use_tqdm=False)
        ttft = time.perf_counter() - start
    figures = {f"{name}_seconds": value for name, value in {"ttft": ttft, **seconds}.items()}
    return {**figures, "num_prompt_tokens": len(output.prompt_token_ids)}


@contextmanager
def _stopwatch(engine: Any, stock: bool) -> Iterator[dict[str, float]]:
    """Seconds in the vision tower (without the projector), in its reductions, and in the decoder's reductions.

    The reduction is everything that a stock tower does not do: scores from queries and keys, selection, merge. On a CPU
    a call has finished when it returns.
    """
    model = worker_of(engine).model_runner.get_model()
    seconds = {"tower": 0.0, "reduction": 0.0, "decoder_reduction": 0.0}

    def timed(function: Any, key: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[key] += time.perf_counter() - start

        return call

    patches = [(model.vision_tower, "forward", "tower")]
    if not stock:
        from ficoco_vllm.decoder import decoder
        from ficoco_vllm.models import reduced_llava
        from ficoco_vllm.vision import tower

        patches += [(reduced_llava, "encode", "tower"), (tower, "_reduce", "reduction")]
        patches += [(decoder, "reduce_rows", "decoder_reduction")]
    with ExitStack() as stack:
        for owner, name, key in patches:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), key)))
        yield seconds
