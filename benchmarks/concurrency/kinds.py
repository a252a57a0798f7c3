"""The rows of `make bench-concurrency`: names to settings, stock vLLM first."""

from typing import Any

KINDS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "V 64": {"method": "ficoco-v", "keep": 64},
    "L 64": {"method": "ficoco-l", "keep": 64},
    "L 64 one-shot": {"method": "ficoco-l", "keep": 64, "schedule": "one-shot"},
    "VL 64": {"method": "ficoco-vl", "keep": 64},
}
