"""Functions that tests run inside the process of the engine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.utils import extract_layer_index

from ficoco_vllm.benchmarks.soak.engine import mixture as soak
from ficoco_vllm.benchmarks.soak.engine.run import Driver
from tests.support.engine import Answer, request, scheduler_of, worker_of
from tests.support.versions import kv_cache_configs


@dataclass
class Ask:
    """One request: prompt, images, tokens to generate, `vllm_xargs` and `mm_processor_kwargs`."""

    prompt: str
    images: list[Image.Image] = field(default_factory=list)
    num_tokens: int = 4
    extra: dict[str, Any] = field(default_factory=dict)
    mm: dict[str, Any] = field(default_factory=dict)

    def params(self, **more: Any) -> SamplingParams:
        """Greedy, all log-probabilities."""
        return SamplingParams(
            temperature=0,
            max_tokens=self.num_tokens,
            ignore_eos=True,
            logprobs=-1,
            extra_args=self.extra or None,
            **more,
        )

    def body(self) -> dict[str, Any]:
        """The prompt as vLLM takes it."""
        return request(self.prompt, self.images, **self.mm)


def ask(engine: LLM, asks: list[Ask]) -> list[Answer]:
    """Send requests together."""
    outputs = engine.generate([one.body() for one in asks], [one.params() for one in asks], use_tqdm=False)
    answers = []
    for output in outputs:
        completion = output.outputs[0]
        rows = [[step[token].logprob for token in sorted(step)] for step in completion.logprobs or []]
        answers.append(
            Answer(list(completion.token_ids), len(output.prompt_token_ids or []), torch.tensor(rows))
        )
    return answers


def take_trace(engine: LLM, trace_id: int) -> list[dict[str, Any]]:
    """The trace of a request, from the only worker."""
    traces: list[list[dict[str, Any]]] = engine.collective_rpc("ficoco_take_trace", args=(trace_id,))
    (trace,) = traces
    return trace


def refusal(engine: LLM, one: Ask, **more: Any) -> str:
    """The message that a request is refused with; empty if it is answered."""
    try:
        engine.generate([one.body()], [one.params(**more)], use_tqdm=False)
    except VLLMValidationError as error:
        return str(error)
    return ""


def ask_noting_preemptions(
    engine: LLM, asks: list[Ask], send: Callable[[LLM, list[Ask]], list[Any]] = ask
) -> tuple[list[Any], list[bool]]:
    """Send requests together; report also, for each preempted one, whether its prompt is reduced."""
    scheduler = scheduler_of(engine)
    original, noted = scheduler._preempt_request, []

    def noting(request: Any, *args: Any, **kwargs: Any) -> Any:
        plan = scheduler.plans.get(request.request_id)
        noted.append(plan is not None and plan.reduces)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = noting
    try:
        return send(engine, asks), noted
    finally:
        scheduler._preempt_request = original


def free_blocks(engine: LLM) -> int:
    """Free blocks of the shared pool."""
    return int(scheduler_of(engine).kv_cache_manager.block_pool.get_num_free_blocks())


def held(engine: LLM) -> list[dict[str, int]]:
    """Blocks that each request holds, group by group, and the other state kept for requests."""
    scheduler = scheduler_of(engine)
    groups = scheduler.kv_cache_manager.coordinator.single_type_managers
    result = [
        {request_id: len(blocks) for request_id, blocks in group.req_to_blocks.items() if blocks}
        for group in groups
    ]
    runner = worker_of(engine).model_runner
    return [*result, dict.fromkeys(scheduler.plans, 1), dict.fromkeys(runner.model_state.plans, 1)]


def abort_in(engine: LLM, asks: list[Ask], phase: str, every: int) -> tuple[list[int], dict[int, list[int]]]:
    """Send requests and abort some of them in a phase.

    Args:
        engine: in this process.
        asks: to be sent together.
        phase: "waiting", "prefilled" (its prompt has been computed, but no token returned),
            "decoding" or "preempted".
        every: every how many requests one is aborted, the first included.

    Returns:
        Indices of those that were aborted, and the tokens of the others.
    """
    planned = [
        soak.Request(
            one.prompt, tuple(one.images), one.num_tokens, one.extra, None if index % every else phase
        )
        for index, one in enumerate(asks)
    ]
    place = {id(ask): index for index, ask in enumerate(planned)}
    answers: dict[int, list[int]] = {}
    driver = Driver(engine, len(asks), on_answer=lambda ask, tokens: answers.update({place[id(ask)]: tokens}))
    driver.answer(list(reversed(planned)))
    assert set(driver.num_aborted) <= {phase}
    return sorted(set(range(len(asks))) - answers.keys()), answers


def most_running(engine: LLM, asks: list[Ask]) -> tuple[int, list[int]]:
    """Send requests together.

    Returns:
        How many of them ran at once, and the blocks that the first one held.
    """
    scheduler = scheduler_of(engine)
    engine.enqueue([one.body() for one in asks], [one.params() for one in asks], use_tqdm=False)
    most, first = 0, [0]
    while engine.llm_engine.has_unfinished_requests():
        engine.llm_engine.step()
        if len(scheduler.running) > most:
            most = len(scheduler.running)
            groups = scheduler.kv_cache_manager.coordinator.single_type_managers
            first = [len(group.req_to_blocks[scheduler.running[0].request_id]) for group in groups]
    return most, first


def cache_error(engine: LLM, num_blocks: int) -> str:
    """Start-up error for a KV cache of this many blocks; empty if it is accepted."""
    core, config = engine.llm_engine.engine_core.engine_core, engine.llm_engine.vllm_config
    before = config.cache_config.num_gpu_blocks_override
    config.cache_config.num_gpu_blocks_override = num_blocks
    try:
        kv_cache_configs(config, core.model_executor.get_kv_cache_specs(), 2**30)
    except ValueError as error:
        return str(error)
    finally:
        config.cache_config.num_gpu_blocks_override = before
    return ""


def written_slots(engine: LLM, one: Ask) -> tuple[list[float], list[int], int]:
    """Answer one request in an empty cache and count.

    Returns:
        Slots written in each layer, blocks held in each group before the end, and tokens of prompt and answer
        whose keys and values are needed.
    """
    runner = worker_of(engine).model_runner
    context = runner.vllm_config.compilation_config.static_forward_context
    groups = runner.kv_cache_config.kv_cache_groups
    segments = {name: group.kv_cache_spec.segment for group in groups for name in group.layer_names}
    layers = [(context[name], segments[name]) for name in sorted(segments, key=extract_layer_index)]
    for layer, _ in layers:
        layer.kv_cache.zero_()
    (request_id,) = engine.enqueue([one.body()], [one.params()], use_tqdm=False)
    managers = scheduler_of(engine).kv_cache_manager.coordinator.single_type_managers
    blocks: list[list[int]] = []
    num_tokens = 0
    while engine.llm_engine.has_unfinished_requests():
        for output in engine.llm_engine.step():
            num_tokens = len(output.prompt_token_ids or []) + len(output.outputs[0].token_ids) - 1
        now = [[b.block_id for held in manager.req_to_blocks.values() for b in held] for manager in managers]
        blocks = now if any(now) else blocks
    assert request_id
    # Keys and values of a token are never all zero, and a slot is written as a whole.
    written = []
    for layer, segment in layers:
        # (blocks, heads, slots, 2 * d), whose inner order is the kernel's own. Layers of several groups share one
        # tensor, so only the blocks that this layer's group held are looked at.
        cache = layer.kv_cache[torch.tensor(blocks[segment])]
        per_slot = cache.shape[1] * cache.shape[3]
        written.append(float((cache != 0).sum()) / per_slot)
    return written, [len(ids) for ids in blocks], num_tokens


def repeat_short(engine: LLM, asks: list[Ask], times: int) -> set[int]:
    """Answer requests over and over, one token each.

    Returns:
        Free blocks seen after each round.
    """
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    seen = set()
    for _ in range(times):
        outputs = engine.generate([one.body() for one in asks], params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == 1 for output in outputs)
        seen.add(free_blocks(engine))
    return seen


def start_up_error(engine: LLM, model: str, ficoco: dict[str, Any], options: dict[str, Any]) -> str:
    """Error for the configuration of another engine, before anything is loaded."""
    try:
        configure(model, ficoco, options)
    except ValueError as error:
        return str(error)
    return ""


def settings_of_another(
    engine: LLM, model: str, ficoco: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """Changes made to the configuration of another engine."""
    return _settings(configure(model, ficoco, options))


def settings_of(engine: LLM) -> dict[str, Any]:
    """Changes made to the configuration of an engine."""
    return _settings(engine.llm_engine.vllm_config)


def configure(model: str, ficoco: dict[str, Any], options: dict[str, Any]) -> Any:
    """The configuration of another engine."""
    arguments = {"max_model_len": 512, "enforce_eager": True, "limit_mm_per_prompt": {"image": 2}, **options}
    return EngineArgs(model, additional_config={"ficoco": ficoco}, **arguments).create_engine_config()


def _settings(config: Any) -> dict[str, Any]:
    scheduler = config.scheduler_config
    return {
        "scheduler": scheduler.scheduler_cls,
        "chunked_prefill": scheduler.enable_chunked_prefill,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_num_encoder_input_tokens": scheduler.max_num_encoder_input_tokens,
        "encoder_cache_size": scheduler.encoder_cache_size,
    }


def compiled_units(engine: LLM) -> list[bool]:
    """Whether each segment of the decoder is a compiled unit that has been compiled."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list as entries
    from torch._dynamo.eval_frame import innermost_fn

    decoder = worker_of(engine).model_runner.get_model().decoder
    innermost: Any = innermost_fn
    return [
        unit is not segment and len(entries(innermost(unit).__func__.__code__)) > 0
        for unit, segment in zip(decoder.units, decoder.segments, strict=True)
    ]
