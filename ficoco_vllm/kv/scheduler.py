"""vLLM's scheduler with a plan for each request, whose decision windows are never split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.kv.admission import images_of
from ficoco_vllm.kv.hashes import mix_windows
from ficoco_vllm.kv.manager import SegmentManager
from ficoco_vllm.kv.steady import SteadyManager
from ficoco_vllm.metrics.families import metrics
from ficoco_vllm.planning.decoder import RequestPlan
from ficoco_vllm.planning.server import decoder_planner


class SegmentScheduler(AsyncScheduler):
    """vLLM's asynchronous scheduler; the managers of the segments count tokens by its plans."""

    kv_cache_manager: KVCacheManager

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.planner = decoder_planner(self.vllm_config.model_config.hf_config)
        self.plans: dict[str, RequestPlan] = {}
        self.chunks = self.scheduler_config.enable_chunked_prefill
        self.managers: Sequence[SegmentManager] = self.kv_cache_manager.coordinator.single_type_managers
        for manager in self.managers:
            assert isinstance(manager, SegmentManager)
            manager.plan_of = self.plans.get
        self.kv_cache_manager = SteadyManager(self.kv_cache_manager, self.managers, self.plans.get)
        self.blocks_held = _gauges(self.vllm_config, self.managers) if self.log_stats else []

    def add_request(self, request: Request) -> None:
        """Plan the request, then queue it."""
        extra_args = request.sampling_params.extra_args if request.sampling_params else None
        plan = self.planner.plan(request.num_prompt_tokens, images_of(request), extra_args)
        self.plans[request.request_id] = plan
        if plan.reduces and self.cache_config.enable_prefix_caching:
            mix_windows(request, plan, self.block_size, self.cache_config.prefix_caching_hash_algo)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule as vLLM, then report the number of held blocks."""
        scheduled = super().schedule(*args, **kwargs)
        self._report_blocks_held()
        return scheduled

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.plans.pop(request.request_id, None)
        freed = super()._free_request(request, *args, **kwargs)
        self._report_blocks_held()
        return freed

    def _report_blocks_held(self) -> None:
        for gauge in self.blocks_held:
            gauge.report()

    def _get_local_prefix_cache_hit(self, request: Request, *limit: int | None) -> Any:
        """The prefix of a request that the cache of every segment holds; see vLLM's scheduler.

        Args:
            request: the request to schedule.
            limit: the most tokens of the prefix; vLLM 0.32 has none.
        """
        plan, manager = self.plans.get(request.request_id), self.kv_cache_manager
        if plan is None or not plan.reduces or not manager.prefix_cache_lookup_enabled(request):
            return super()._get_local_prefix_cache_hit(request, *limit)
        # The last token is computed in any case, for its logits.
        computed = (request.num_tokens - 1, len(request.block_hashes) * self.block_size)
        most = min(*computed, *(tokens for tokens in limit if tokens is not None))
        length = plan.reusable(most, self.block_size)
        for segment in self.managers:
            _, length = segment.find_blocks(plan, request.block_hashes, length)
        blocks = [segment.find_blocks(plan, request.block_hashes, length)[0] for segment in self.managers]
        return manager.create_kv_cache_blocks(tuple(blocks)), length, 0, False

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Schedule as vLLM, except that a step ends before a window that it cannot hold with all of its images.

        vLLM calls this last of all limits on a request's tokens in a step, and uses the number that it returns.
        """
        if num_computed_tokens >= request.num_prompt_tokens:
            return [], num_new_tokens, encoder_compute_budget, [], []
        plan = self.plans.get(request.request_id)

        def allowed(num_tokens: int) -> int:
            if plan is None or (self.chunks and not plan.reduces):
                return num_tokens
            if self.chunks:
                return plan.chunk(num_computed_tokens, num_tokens)
            return num_tokens if num_tokens >= num_new_tokens else 0

        def schedule(num_tokens: int) -> Any:
            return super(SegmentScheduler, self)._try_schedule_encoder_inputs(
                request, num_computed_tokens, num_tokens, encoder_compute_budget, *args, **kwargs
            )

        scheduled = schedule(allowed(num_new_tokens))
        if allowed(scheduled[1]) < scheduled[1]:
            # vLLM ended the step before an image for which it has no room, within a window.
            self.encoder_cache_manager.free(request)
            scheduled = schedule(allowed(scheduled[1])) if allowed(scheduled[1]) else ([], 0)
        if scheduled[1] == 0:
            # While it waits, its cached images may be evicted: an earlier request may need the space.
            self.encoder_cache_manager.free(request)
            return [], 0, encoder_compute_budget, [], []
        return scheduled


@dataclass
class _BlocksHeld:
    """The gauge of one segment, written only when its value changes."""

    manager: SegmentManager
    gauge: Any
    value: int = -1

    def report(self) -> None:
        if self.manager.num_held != self.value:
            self.value = self.manager.num_held
            self.gauge.set(self.value)


def _gauges(vllm_config: Any, managers: Sequence[SegmentManager]) -> list[_BlocksHeld]:
    model = vllm_config.model_config
    config = FicocoConfig.of(model.hf_config)
    if not config.metrics:
        return []
    engine = str(vllm_config.parallel_config.data_parallel_index)
    labels = (model.served_model_name, engine, config.method)
    held = metrics().kv_blocks_held
    return [
        _BlocksHeld(manager, held.labels(*labels, str(manager.kv_cache_spec.segment))) for manager in managers
    ]
