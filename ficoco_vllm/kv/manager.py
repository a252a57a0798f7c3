"""Block manager of one segment, which allocates the blocks that the plan needs."""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

# (request id, segment, computed tokens) -> tokens of the request that the segment holds.
CountTokens = Callable[[str, int, int], int]


class SegmentManager(FullAttentionManager):
    """vLLM's manager with token counts translated into those of its segment.

    Attributes:
        count_tokens: set by the scheduler.
        num_held: blocks that requests hold in this segment.
    """

    count_tokens: CountTokens | None = None
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

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the content of a block depends on the whole prompt, so no later prompt may reuse it."""

    def _held(self, request_id: str, num_tokens: int) -> int:
        assert self.count_tokens is not None, "bound by SegmentScheduler"
        return self.count_tokens(request_id, self.kv_cache_spec.segment, num_tokens)
