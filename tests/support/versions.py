"""Names of vLLM that tests use and that the supported versions have in different modules; see `compat/versions.py`."""

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_configs
except ImportError:  # vLLM 0.32
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

__all__ = ["get_kv_cache_configs"]
