"""Counts the requests of one server by reduction method, fed by `hooks/request_metrics.py`."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.metrics.families import NO_ENGINE, OFF, TEXT, metrics, observe_all, set_default_budget
from ficoco_vllm.metrics.savings import Account, Accountant
from ficoco_vllm.processing import BUDGET, SIZES


@dataclass
class Tracked:
    """One request in the front end.

    Attributes:
        account: what it saves.
        meter: of its server.
        engine: label, known from the first output on.
        prefilled: whether that has come.
        ended: whether its end was counted.
    """

    account: Account
    meter: "Meter"
    engine: str
    prefilled: bool = False
    ended: bool = False


@dataclass
class Step:
    """What one batch of outputs of an engine says."""

    first: list[tuple[Tracked, float]] = field(default_factory=list)
    later: list[tuple[Tracked, float]] = field(default_factory=list)
    ended: list[tuple[Tracked, str]] = field(default_factory=list)


class Meter:
    """Counts the requests of one server."""

    def __init__(self, vllm_config: Any) -> None:
        """Read what does not change.

        Args:
            vllm_config: vLLM's configuration, with a reduction method.
        """
        self.vllm_config = vllm_config
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self.accountant = Accountant.of(model.hf_config)
        plan = self.accountant.plan
        self.metrics = metrics()
        self.model_name: str = model.served_model_name
        self.method = plan.config.method or OFF
        self.num_segments = plan.num_segments
        self.token_bytes = token_layer_bytes(vllm_config) * plan.num_layers // self.num_segments
        self.num_engines = 1
        self.only_engine = "0" if parallel.data_parallel_size == 1 else NO_ENGINE

    def __deepcopy__(self, memo: Any) -> "Meter":
        """Itself: sampling parameters that carry it may be copied."""
        return self

    @classmethod
    def of(cls, vllm_config: Any) -> "Meter | None":
        """The meter of a server, None where nothing is to be counted."""
        config = FicocoConfig.of(vllm_config.model_config.hf_config)
        return cls(vllm_config) if config.method is not None and config.metrics else None

    def begin(self, engines: Sequence[int]) -> None:
        """Let the counters stand at zero before the first request, so that rates see it."""
        self.num_engines = max(1, len(engines))
        decoder, tower = self.accountant.plan.decoder, self.accountant.plan.tower
        keep = tower.default.keep if decoder is None else decoder.keep
        for index in engines:
            engine = str(index)
            set_default_budget(self.model_name, self.method, keep, index)
            for method in (self.method, OFF, TEXT):
                labels = (self.model_name, engine, method)
                self.metrics.visual_tokens_in.labels(*labels)
                self.metrics.visual_tokens_kept.labels(*labels)
                self.metrics.prefill_flops_avoided.labels(*labels)
                self.metrics.budget_tokens.labels(*labels)
                self.metrics.time_to_first_token_seconds.labels(*labels)
                self.metrics.inter_token_latency_seconds.labels(*labels)
                for outcome in ("stop", "length", "abort", "error"):
                    self.metrics.requests.labels(*labels, outcome)
            for segment in range(self.num_segments):
                labels = (self.model_name, engine, self.method)
                self.metrics.kv_tokens_avoided.labels(*labels, str(segment))
                self.metrics.kv_bytes_avoided.labels(*labels, str(segment))
                self.metrics.kv_blocks_saved.labels(*labels, str(segment))
        self.metrics.requests.labels(self.model_name, NO_ENGINE, self.method, "refused")

    def account(self, prompt: Any, request: Any) -> Account:
        """What a request that was admitted saves.

        Args:
            prompt: as it came from the renderer.
            request: vLLM's `EngineCoreRequest`.
        """
        images = [
            (feature.mm_position.offset, feature.mm_position.length) for feature in request.mm_features or ()
        ]
        budget, sizes = (
            (prompt.get(BUDGET), prompt.get(SIZES, ())) if isinstance(prompt, dict) else (None, ())
        )
        params = request.sampling_params
        num_tokens = len(request.prompt_token_ids or ())
        return self.accountant.account(
            num_tokens, images, budget, params.extra_args if params else None, sizes
        )

    def record(self, step: Step, engine: str) -> None:
        """Count what one batch of outputs says.

        Args:
            step: noted while vLLM went through the outputs.
            engine: label.
        """
        families = self.metrics
        for tracked, seconds in step.first:
            tracked.engine = engine
            if not tracked.prefilled:
                tracked.prefilled = True
                self._count_prefill(tracked)
            labels = (self.model_name, engine, tracked.account.method)
            families.time_to_first_token_seconds.labels(*labels).observe(seconds)
        by_method: defaultdict[str, list[float]] = defaultdict(list)
        for tracked, seconds in step.later:
            by_method[tracked.account.method].append(seconds)
        for method, values in by_method.items():
            observe_all(families.inter_token_latency_seconds.labels(self.model_name, engine, method), values)
        for tracked, outcome in step.ended:
            self.end(tracked, outcome)

    def end(self, tracked: Tracked, outcome: str) -> None:
        """Count the end of a request, once."""
        if tracked.ended:
            return
        tracked.ended = True
        labels = (self.model_name, tracked.engine, tracked.account.method)
        self.metrics.requests.labels(*labels, outcome).inc()
        if tracked.prefilled:
            self._save_blocks(tracked, -1)

    def hold_blocks(self, usage: float, engine: str) -> None:
        """Tell the blocks in use where the engine's scheduler is vLLM's own, which does not count by segment.

        Args:
            usage: share of the blocks in use, as vLLM measures it.
            engine: label.
        """
        if self.accountant.plan.decoder is not None:
            return
        total = self.vllm_config.cache_config.num_gpu_blocks or 0
        per_engine = total // self.num_engines  # vLLM adds up those of the engines that it talks to
        held = round(usage * max(0, per_engine - 1))  # one block is vLLM's null block
        self.metrics.kv_blocks_held.labels(self.model_name, engine, self.method, "0").set(held)

    def _count_prefill(self, tracked: Tracked) -> None:
        account, families = tracked.account, self.metrics
        labels = (self.model_name, tracked.engine, account.method)
        if account.visual_tokens_in:
            families.visual_tokens_in.labels(*labels).inc(account.visual_tokens_in)
            families.visual_tokens_kept.labels(*labels).inc(account.visual_tokens_kept)
            observe_all(families.budget_tokens.labels(*labels), account.budgets)
        if account.flops_avoided:
            families.prefill_flops_avoided.labels(*labels).inc(account.flops_avoided)
        for segment, num_tokens in enumerate(account.missing):
            if num_tokens:
                families.kv_tokens_avoided.labels(*labels, str(segment)).inc(num_tokens)
                families.kv_bytes_avoided.labels(*labels, str(segment)).inc(num_tokens * self.token_bytes)
        self._save_blocks(tracked, +1)

    def _save_blocks(self, tracked: Tracked, sign: int) -> None:
        labels = (self.model_name, tracked.engine, tracked.account.method)
        block_size = self.vllm_config.cache_config.block_size
        for segment, num_tokens in enumerate(tracked.account.missing):
            if num_tokens:
                saved = self.metrics.kv_blocks_saved.labels(*labels, str(segment))
                saved.inc(sign * num_tokens / block_size)


def token_layer_bytes(vllm_config: Any) -> int:
    """Bytes of one token's keys and values in one decoder layer, on all tensor-parallel workers.

    Args:
        vllm_config: vLLM's configuration.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_heads = model.get_num_kv_heads(parallel) * parallel.tensor_parallel_size
    dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model)
    return int(2 * num_heads * model.get_head_size() * dtype.itemsize)
