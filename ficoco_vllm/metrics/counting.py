"""Counts the requests of one server by reduction method, fed by `hooks/`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.metrics.families import NO_ENGINE, OFF, TEXT, metrics, observe_all, set_default_budget
from ficoco_vllm.metrics.savings import Savings, SavingsPlanner, read_prompt


@dataclass
class CountedRequest:
    """State of one request in the front end.

    Attributes:
        savings: its savings.
        counter: counter of its server.
        engine: label, known from the first output on.
        prompt: arguments of `SavingsPlanner.compute`.
        num_cached: tokens of the prompt that the prefix cache held, known from the first output on.
        prefilled: whether its prefill has been counted.
        ended: whether its end has been counted.
    """

    savings: Savings
    counter: "RequestCounter"
    engine: str
    prompt: tuple[Any, ...] = ()
    num_cached: int = 0
    prefilled: bool = False
    ended: bool = False


@dataclass
class BatchOutputs:
    """One batch of an engine's outputs: requests with their latencies in seconds, and those that ended."""

    first: list[tuple[CountedRequest, float]] = field(default_factory=list)
    later: list[tuple[CountedRequest, float]] = field(default_factory=list)
    ended: list[tuple[CountedRequest, str]] = field(default_factory=list)


class RequestCounter:
    """Counts the requests of one server."""

    def __init__(self, vllm_config: Any) -> None:
        """Read the server's configuration.

        Args:
            vllm_config: vLLM's configuration, with a reduction method.
        """
        self.vllm_config = vllm_config
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self.savings_planner = SavingsPlanner.of(model.hf_config)
        plan = self.savings_planner.plan
        self.metrics = metrics()
        self.model_name: str = model.served_model_name
        self.method = plan.config.method or OFF
        self.num_segments = plan.num_segments
        self.token_bytes = token_layer_bytes(vllm_config) * plan.num_layers // self.num_segments
        self.num_engines = 1
        self.only_engine = "0" if parallel.data_parallel_size == 1 else NO_ENGINE

    def __deepcopy__(self, memo: Any) -> "RequestCounter":
        """The counter itself: vLLM may copy the sampling parameters that carry it."""
        return self

    @classmethod
    def of(cls, vllm_config: Any) -> "RequestCounter | None":
        """The counter of a server, None where nothing is counted."""
        config = FicocoConfig.of(vllm_config.model_config.hf_config)
        return cls(vllm_config) if config.method is not None and config.metrics else None

    def begin(self, engines: Sequence[int]) -> None:
        """Set the counters to zero before the first request, so that rates include it."""
        self.num_engines = max(1, len(engines))
        families = self.metrics
        decoder, tower = self.savings_planner.plan.decoder, self.savings_planner.plan.tower
        keep = tower.default.keep if decoder is None else decoder.keep
        for index in engines:
            set_default_budget(self.model_name, self.method, keep, index)
            for method in (self.method, OFF, TEXT):
                labels = (self.model_name, str(index), method)
                families.visual_tokens_in.labels(*labels)
                families.visual_tokens_kept.labels(*labels)
                families.prefill_flops_avoided.labels(*labels)
                families.budget_tokens.labels(*labels)
                families.time_to_first_token_seconds.labels(*labels)
                families.inter_token_latency_seconds.labels(*labels)
                for outcome in ("stop", "length", "abort", "error"):
                    families.requests.labels(*labels, outcome)
            for segment in range(self.num_segments):
                for family in (
                    families.kv_tokens_avoided,
                    families.kv_bytes_avoided,
                    families.kv_blocks_saved,
                ):
                    family.labels(self.model_name, str(index), self.method, str(segment))
        families.requests.labels(self.model_name, NO_ENGINE, self.method, "refused")

    def request(
        self,
        prompt: dict[str, Any],
        images: Sequence[tuple[int, int]],
        extra_args: Mapping[str, Any] | None,
    ) -> CountedRequest:
        """A request that has been admitted; see `SavingsPlanner.of_prompt` for the arguments."""
        savings = self.savings_planner.of_prompt(prompt, images, extra_args)
        return CountedRequest(savings, self, self.only_engine, read_prompt(prompt, images, extra_args))

    def record(self, outputs: BatchOutputs, engine: str) -> None:
        """Count one batch of outputs.

        Args:
            outputs: collected while vLLM went through them.
            engine: label.
        """
        families = self.metrics
        for request, seconds in outputs.first:
            request.engine = engine
            if not request.prefilled:
                request.prefilled = True
                if request.num_cached:
                    request.savings = self.savings_planner.of_rest(
                        request.num_cached, request.savings, *request.prompt
                    )
                self._count_prefill(request)
            labels = (self.model_name, engine, request.savings.method)
            families.time_to_first_token_seconds.labels(*labels).observe(seconds)
        by_method: defaultdict[str, list[float]] = defaultdict(list)
        for request, seconds in outputs.later:
            by_method[request.savings.method].append(seconds)
        for method, values in by_method.items():
            observe_all(families.inter_token_latency_seconds.labels(self.model_name, engine, method), values)
        for request, outcome in outputs.ended:
            self.end(request, outcome)

    def end(self, request: CountedRequest, outcome: str) -> None:
        """Count the end of a request, once."""
        if request.ended:
            return
        request.ended = True
        labels = (self.model_name, request.engine, request.savings.method)
        self.metrics.requests.labels(*labels, outcome).inc()
        if request.prefilled:
            self._add_blocks_saved(request, -1)

    def set_blocks_held(self, usage: float, engine: str) -> None:
        """Report the blocks in use, except where our scheduler reports them by segment.

        Args:
            usage: share of the blocks in use, as vLLM measures it.
            engine: label.
        """
        if self.savings_planner.plan.decoder is not None:
            return
        total = self.vllm_config.cache_config.num_gpu_blocks or 0
        per_engine = total // self.num_engines  # vLLM adds up the blocks of its engines
        held = round(usage * max(0, per_engine - 1))  # one block is vLLM's null block
        self.metrics.kv_blocks_held.labels(self.model_name, engine, self.method, "0").set(held)

    def _count_prefill(self, request: CountedRequest) -> None:
        savings, families = request.savings, self.metrics
        labels = (self.model_name, request.engine, savings.method)
        if savings.visual_tokens_in:
            families.visual_tokens_in.labels(*labels).inc(savings.visual_tokens_in)
            families.visual_tokens_kept.labels(*labels).inc(savings.visual_tokens_kept)
            observe_all(families.budget_tokens.labels(*labels), savings.budgets)
        if savings.flops_avoided:
            families.prefill_flops_avoided.labels(*labels).inc(savings.flops_avoided)
        for segment, num_tokens in enumerate(savings.missing):
            if num_tokens > 0:  # a counter that refuses a value would end vLLM's output handler
                families.kv_tokens_avoided.labels(*labels, str(segment)).inc(num_tokens)
                families.kv_bytes_avoided.labels(*labels, str(segment)).inc(num_tokens * self.token_bytes)
        self._add_blocks_saved(request, +1)

    def _add_blocks_saved(self, request: CountedRequest, sign: int) -> None:
        labels = (self.model_name, request.engine, request.savings.method)
        block_size = self.vllm_config.cache_config.block_size
        for segment, num_tokens in enumerate(request.savings.missing):
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
