"""KV cache specification of one segment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class SegmentSpec(FullAttentionSpec):
    """Full attention whose layers hold the tokens of one segment.

    Attributes:
        segment: index; layers of two segments never share a group.
        non_causal: makes vLLM prefill prompts in one step and find no block by the hash of its tokens, although the
            attention is causal; for servers without decision windows.
    """

    segment: int = 0
    non_causal: bool = True

    def is_uniform_with_collection(self, kv_cache_specs: Mapping[str, KVCacheSpec]) -> bool:
        """Whether all these layers may share one group."""
        return all(
            isinstance(spec, SegmentSpec) and spec.segment == self.segment for spec in kv_cache_specs.values()
        )

    @classmethod
    def merge(cls, specs: Sequence[Any]) -> Any:
        """The specification of a group.

        Raises:
            AssertionError: two segments meet; vLLM then puts them into two groups.
        """
        assert all(spec == specs[0] for spec in specs[1:]), "one KV group holds one segment"
        return specs[0]


def register_spec() -> None:
    """Register the specification and its manager with vLLM in this process. Idempotent."""
    from ficoco_vllm.kv.manager import SegmentManager

    # Built-in specifications first: vLLM registers them only if the registry is still empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(SegmentSpec, SegmentManager, uniform_type_base_spec=SegmentSpec)
