"""Names of our fields in a request's `mm_processor_kwargs` (for the tower) and `vllm_xargs` (for the decoder)."""

from collections.abc import Iterable
from typing import Any

PREFIX = "ficoco_"
KEEP = "ficoco_keep"
METHOD = "ficoco_method"
# Ends of the decision windows, counted in tokens of the prompt with its placeholders: one number or several.
WINDOW = "ficoco_window"
# The mark of a request that is to be traced.
TRACE = "ficoco_trace"
# vLLM's request schema may turn an integer into a float, which is exact up to here.
MAX_TRACE_ID = 2**53 - 1


def find_unknown(names: Iterable[str], *, explain: bool, windows: bool = False) -> str | None:
    """The first of our fields that a server does not know.

    Args:
        names: of all fields that the request sets.
        explain: whether the server traces requests.
        windows: whether a request may name the ends of its decision windows.
    """
    allowed = {KEEP, METHOD}
    if explain:
        allowed.add(TRACE)
    if windows:
        allowed.add(WINDOW)
    return min((name for name in names if name.startswith(PREFIX) and name not in allowed), default=None)


def unknown_field(name: str) -> str:
    """Error text for a field that a server does not know."""
    return f"{name} is not a field of this server; allowed: {KEEP}, {METHOD}"


def check_trace_id(value: Any) -> int:
    """Validate the mark of a request that is to be traced.

    Args:
        value: as the client sent it.

    Raises:
        ValueError: starting with the field, then its value and what is allowed.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TRACE_ID:
        raise ValueError(f"{TRACE} = {value!r} is not allowed; allowed: an integer from 0 to {MAX_TRACE_ID}")
    return value
