"""When an image counts as sent to the engine."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache as Cache
from vllm.multimodal.inputs import MultiModalKwargsItem

from ficoco_vllm.hooks.processor_cache import hook_processor_cache, note_sent

pytestmark = pytest.mark.compat


def test_an_image_counts_as_sent_once_it_is() -> None:
    """In vLLM itself an image counts as sent when it was only rendered."""
    hook_processor_cache()
    hook_processor_cache()
    settings: Any = SimpleNamespace(get_multimodal_config=lambda: SimpleNamespace(mm_processor_cache_gb=1))
    cache = Cache(settings)
    item: Any = (MultiModalKwargsItem.dummy(), [])
    ours: Any = Cache.is_cached_item
    vllm_s = ours.__wrapped__
    assert cache.get_and_update_item(item, "a")[0] is item[0]
    assert vllm_s(cache, "a"), "no longer needed: vLLM waits until an image has been sent"
    assert not cache.is_cached_item("a")
    assert cache.get_and_update_item(item, "a")[0] is item[0], "the request that brought it was refused"
    note_sent(cache, {"mm_hashes": {"image": ["a"]}})
    assert cache.is_cached_item("a")
    assert cache.get_and_update_item(None, "a")[0] is None
    cache.invalidate("a")  # or it had to make room
    assert not cache.is_cached_item("a")
    assert cache.get_and_update_item(item, "a")[0] is item[0]
    assert not cache.is_cached_item("a")
    note_sent(None, {"mm_hashes": {"image": ["a"]}})
