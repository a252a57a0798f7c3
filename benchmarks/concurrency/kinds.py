"""What is counted: stock vLLM, and ours by settings."""

from typing import Any

KINDS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "V 64": {"method": "ficoco-v", "keep": 64},
    "L 64": {"method": "ficoco-l", "keep": 64},
    "L 64 one-shot": {"method": "ficoco-l", "keep": 64, "schedule": "one-shot"},
    "VL 64": {"method": "ficoco-vl", "keep": 64},
}
