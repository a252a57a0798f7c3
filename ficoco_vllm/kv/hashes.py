"""Block hashes of a reduced prompt: they stand for everything that decides the content of a block."""

from collections.abc import Callable
from typing import Any

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import BlockHash

from ficoco_vllm.planning.decoder import RequestPlan
from ficoco_vllm.planning.windows import Window


def mix_windows(request: Any, plan: RequestPlan, block: int, algorithm: str) -> None:
    """Mix each decision window into the hash of the block in which it starts.

    Blocks from there on depend on all tokens of the window, on the method and on the number of tokens that leave.
    Hashes are chained, so that all later ones contain it, beside the adapter's name and the salt, which vLLM adds.

    Args:
        request: vLLM's request, whose hashes are computed anew.
        plan: of the request.
        block: tokens of one block.
        algorithm: name of vLLM's hash function for blocks.
    """
    original: Callable[[Any], list[BlockHash]] | None = request._block_hasher
    if original is None or not plan.windows:
        return
    hash_function = get_hash_fn_by_name(algorithm)
    # Two windows may start in one block.
    windows: dict[int, list[Window]] = {}
    for window in plan.windows:
        windows.setdefault(window.start // block, []).append(window)

    def hash_blocks(one: Any) -> list[BlockHash]:
        for index in sorted(windows):
            known = len(one.block_hashes)
            if known > index:
                continue
            hashes = original(one)
            if known + len(hashes) <= index:
                return hashes
            del hashes[index + 1 - known :]
            hashes[-1] = BlockHash(
                hash_function((hashes[-1], *_content(one, plan, windows[index], index * block)))
            )
            one.block_hashes.extend(hashes)
        return original(one)

    del request.block_hashes[min(windows) :]
    request._block_hasher = hash_blocks
    request.update_block_hashes()


def _content(request: Any, plan: RequestPlan, windows: list[Window], start: int) -> tuple[Any, ...]:
    """What decides the content of blocks from the one in which windows start, at `start`."""
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
