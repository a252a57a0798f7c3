"""Block hashes of a reduced prompt: they cover everything that determines the content of a block."""

from typing import Any

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import BlockHash

from ficoco_vllm.planning.decoder import RequestPlan
from ficoco_vllm.planning.windows import Window


def mix_windows(request: Any, plan: RequestPlan, block: int, algorithm: str) -> None:
    """Mix each decision window into the hash of the block in which it starts.

    Blocks from there on depend on all tokens of the window, on the method and on the number of tokens that leave.
    Hashes are chained, so all later ones contain it, in addition to the adapter's name and the salt, which vLLM adds.

    Args:
        request: vLLM's request before its first step; its hashes from the first window on are recomputed.
        plan: plan of the request.
        block: tokens of one block.
        algorithm: name of vLLM's hash function for blocks.
    """
    hash_function = get_hash_fn_by_name(algorithm)
    # Two windows may start in one block.
    windows: dict[int, list[Window]] = {}
    for window in plan.windows:
        windows.setdefault(window.start // block, []).append(window)
    for index in sorted(windows):
        if index >= len(request.block_hashes):
            return  # `RequestPlan.reusable` ends before it
        content = _content(request, plan, windows[index], index * block)
        del request.block_hashes[index + 1 :]
        request.block_hashes[index] = BlockHash(hash_function((request.block_hashes[index], *content)))
        request.update_block_hashes()


def _content(request: Any, plan: RequestPlan, windows: list[Window], start: int) -> tuple[Any, ...]:
    """Hash input for blocks from the one in which windows start, at `start`."""
    images = tuple(
        (
            request.mm_features[index].identifier,
            *plan.images[index],
            *(counts[index] for counts in plan.counts),
        )
        for window in windows
        for index in window.images
    )
    ends = tuple(window.end for window in windows)
    return plan.method, ends, tuple(request.all_token_ids[start : ends[-1]]), images
