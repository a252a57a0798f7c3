"""vLLM's processor cache in the front end: an image is marked as sent once its request has reached the engine.

The cache notes an image while the prompt is rendered. A request that is refused or aborted after that never brings it
to the engine, and the next one with the same image is sent without it: vLLM answers that one with 500 and only then
sends the image again. Here an image that has not been sent is processed again.
"""

from typing import Any

from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache as Cache

from ficoco_vllm.hooks.wrapping import wrap

# Hashes of sent images that a cache holds before those that vLLM has evicted are forgotten.
_MAX_SENT = 100_000


def hook_processor_cache() -> None:
    """Make the cache distinguish sent images from processed ones. Idempotent."""
    wrap(Cache, "is_cached_item", _is_cached_item)
    wrap(Cache, "get_and_update_item", _get_and_update_item)


def _is_cached_item(original: Any, self: Any, mm_hash: str) -> bool:
    return mm_hash in _sent(self) and original(self, mm_hash)


def _get_and_update_item(original: Any, self: Any, mm_item: Any, mm_hash: str) -> Any:
    if mm_item is not None:  # processed again, so it is sent with its request
        self.invalidate(mm_hash)
        _sent(self).discard(mm_hash)
    return original(self, mm_item, mm_hash)


def _sent(cache: Any) -> set[str]:
    """Hashes of the images that the engine has received, stored on the cache itself."""
    sent: set[str] = vars(cache).setdefault("ficoco", set())
    return sent


def note_sent(cache: Any, prompt: Any) -> None:
    """Note that a request's images go to the engine.

    Args:
        cache: vLLM's processor cache, of any kind, or None.
        prompt: as vLLM rendered it.
    """
    if not isinstance(cache, Cache) or not isinstance(prompt, dict):
        return
    sent = _sent(cache)
    for hashes in (prompt.get("mm_hashes") or {}).values():
        sent.update(hashes)
    if len(sent) > _MAX_SENT:
        sent.intersection_update([mm_hash for mm_hash in list(sent) if mm_hash in cache._cache])
