"""Block manager of one segment, which allocates the blocks that the plan needs and finds them again."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from ficoco_vllm.planning.decoder import RequestPlan


class SegmentManager(FullAttentionManager):
    """vLLM's manager with token counts translated into those of its segment.

    Attributes:
        plan_of: from a request's id to its plan; set by the scheduler.
        num_held: blocks that requests hold in this segment.
    """

    plan_of: Callable[[str], RequestPlan | None] | None = None
    num_held: int = 0

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        **kwargs: Any,
    ) -> int:
        """Blocks that the request still needs here; see vLLM's manager for the arguments."""
        num_blocks: int = super().get_num_blocks_to_allocate(
            request_id,
            self._held(request_id, num_tokens),
            new_computed_blocks,
            self._held(request_id, total_computed_tokens),
            self._held(request_id, num_local_computed_tokens),
            self._held(request_id, num_tokens_main_model),
            **kwargs,
        )
        return num_blocks

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Blocks for the request's tokens in this segment."""
        blocks: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id, self._held(request_id, num_tokens), self._held(request_id, num_tokens_main_model)
        )
        self.num_held += len(blocks)
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The blocks of a request that ends or is preempted."""
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        self.num_held -= len(blocks)
        return blocks

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> None:
        """Give a request the cached blocks of its prefix."""
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        self.num_held += len(self.req_to_blocks[request_id])

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Record full blocks under the hashes of the prompt's blocks that they correspond to.

        Args:
            request: vLLM's request.
            num_tokens: number of its tokens that have been computed.
            *args: see vLLM's manager.
            **kwargs: see vLLM's manager.
        """
        plan = self._plan(request.request_id)
        if plan is None or not plan.reduces:
            super().cache_blocks(request, num_tokens, *args, **kwargs)
            return
        num_cached = self.num_cached_block.get(request.request_id, 0)
        num_full = self._num_blocks(plan, plan.reusable(num_tokens, self.block_size))
        if num_cached >= num_full:
            return
        # vLLM's pool reads only the hashes of new blocks.
        hashes = [None] * num_cached + [
            request.block_hashes[self._prompt_block(plan, index)] for index in range(num_cached, num_full)
        ]
        self.block_pool.cache_full_blocks(
            request=SimpleNamespace(block_hashes=hashes),
            blocks=self.req_to_blocks[request.request_id],
            num_cached_blocks=num_cached,
            num_full_blocks=num_full,
            block_size=self.block_size,
            kv_cache_group_id=self.kv_cache_group_id,
        )
        self.num_cached_block[request.request_id] = num_full

    def find_blocks(
        self, plan: RequestPlan, block_hashes: Sequence[Any], num_tokens: int
    ) -> tuple[list[KVCacheBlock], int]:
        """Cached blocks of a prefix of a request whose prompt is reduced.

        Args:
            plan: plan of the request.
            block_hashes: hashes of the prompt's blocks.
            num_tokens: the most that the prefix may have, as `RequestPlan.reusable` returns it.

        Returns:
            The blocks, and the number of prompt tokens that they cover.
        """
        num_wanted = self._num_blocks(plan, num_tokens)
        blocks: list[KVCacheBlock] = []
        for index in range(num_wanted):
            block_hash = block_hashes[self._prompt_block(plan, index)]
            cached = self.block_pool.get_cached_block(block_hash, [self.kv_cache_group_id])
            if cached is None:
                break
            blocks += cached
        if len(blocks) < num_wanted:
            end = (self._prompt_block(plan, len(blocks) - 1) + 1) * self.block_size if blocks else 0
            num_tokens = plan.reusable(end, self.block_size)
            del blocks[self._num_blocks(plan, num_tokens) :]
        return blocks, num_tokens

    def _plan(self, request_id: str) -> RequestPlan | None:
        assert self.plan_of is not None, "bound by SegmentScheduler"
        return self.plan_of(request_id)

    def _num_blocks(self, plan: RequestPlan, num_tokens: int) -> int:
        return plan.num_kv_tokens(self.kv_cache_spec.segment, num_tokens) // int(self.block_size)

    def _prompt_block(self, plan: RequestPlan, index: int) -> int:
        return plan.prompt_block(self.kv_cache_spec.segment, index, self.block_size)

    def _held(self, request_id: str, num_tokens: int) -> int:
        plan = self._plan(request_id)
        return num_tokens if plan is None else plan.num_kv_tokens(self.kv_cache_spec.segment, num_tokens)
