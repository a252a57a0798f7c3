"""Fast path for decoding steps that allocate and fill no block, which are most of them."""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from ficoco_vllm.kv.manager import SegmentManager
from ficoco_vllm.planning.decoder import RequestPlan


class SteadyManager(KVCacheManager):
    """vLLM's manager, which skips the segments in steps where none has work.

    Attributes:
        room: from a request to the number of its tokens up to which its blocks suffice and none is filled.
        num_full: from a request to the blocks of its tokens that have been filled.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        segments: Sequence[SegmentManager],
        plan_of: Callable[[str], RequestPlan | None],
    ) -> None:
        """Replace a manager.

        Args:
            manager: the manager whose state this one shares.
            segments: its managers of the segments.
            plan_of: from a request's id to its plan.
        """
        self.__dict__ = vars(manager)
        self.room: dict[str, int] = {}
        self.num_full: dict[str, int] = {}
        self.segments, self.plan_of = segments, plan_of

    def allocate_slots(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        """Blocks for the next tokens of a request; see vLLM's manager."""
        request_id = request.request_id
        end = request.num_computed_tokens + num_new_tokens
        if end + kwargs.get("num_lookahead_tokens", 0) <= self.room.get(request_id, 0):
            return self.empty_kv_cache_blocks
        blocks = super().allocate_slots(request, num_new_tokens, *args, **kwargs)
        plan = self.plan_of(request_id)
        after_images = plan is None or not plan.images or sum(plan.images[-1]) <= request.num_computed_tokens
        if blocks is not None and after_images:
            block_size = int(self.segments[0].block_size)
            num_full = min(end, request.num_tokens) // block_size
            held = min(
                len(segment.req_to_blocks[request_id]) * block_size + (plan.dropped[index] if plan else 0)
                for index, segment in enumerate(self.segments)
            )
            self.num_full[request_id] = num_full
            self.room[request_id] = min(held, (num_full + 1) * block_size - 1)
        return blocks

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Record the full blocks of a request; see vLLM's manager."""
        num_full = num_computed_tokens // int(self.segments[0].block_size)
        if num_full > self.num_full.get(request.request_id, -1):
            super().cache_blocks(request, num_computed_tokens)
            if request.request_id in self.num_full:
                self.num_full[request.request_id] = num_full

    def free(self, request: Request) -> None:
        """Free the blocks of a request."""
        self._forget(request)
        super().free(request)

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        """The blocks of a request, to be given back later."""
        self._forget(request)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request)
        return blocks

    def _forget(self, request: Request) -> None:
        self.room.pop(request.request_id, None)
        self.num_full.pop(request.request_id, None)
