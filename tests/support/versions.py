"""Names of vLLM that only tests use and that the supported versions have in different modules, or in other forms."""

import sys
from typing import Any

from vllm.v1.kv_cache_interface import KVCacheConfig

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_configs
except ImportError:  # vLLM 0.32
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs


def kv_cache_configs(config: Any, specs: list[dict[str, Any]], num_bytes: int) -> list[KVCacheConfig]:
    """KV cache configuration of each worker.

    Args:
        config: vLLM's.
        specs: of the layers of each worker.
        num_bytes: memory of each.

    Raises:
        ValueError: the longest request does not fit.
    """
    # vLLM 0.33 wants the groups of all layers, which 0.32 finds by itself.
    find = getattr(sys.modules[get_kv_cache_configs.__module__], "get_global_kv_cache_groups", None)
    groups = [] if find is None else [find(config, specs)]
    configs: list[KVCacheConfig] = get_kv_cache_configs(config, specs, [num_bytes] * len(specs), *groups)
    return configs
