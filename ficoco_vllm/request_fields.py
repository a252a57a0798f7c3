"""Names of our fields in a request's `mm_processor_kwargs` (tower) and `vllm_xargs` (decoder), and in its prompt."""

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

# Every argument whose name starts like this is ours; those that are not named below are refused.
PREFIX = "ficoco"
# The field of request bodies.
FIELD = "ficoco"
KEEP = "ficoco_keep"
KEEP_RATIO = "ficoco_keep_ratio"
METHOD = "ficoco_method"
# Ends of the decision windows, counted in tokens of the prompt with its placeholders: one number or several.
WINDOW = "ficoco_window"
# The question about the images, for methods that compare them with it: a text.
QUESTION = "ficoco_question"
# The mark of a request that is to be traced.
TRACE = "ficoco_trace"
# Keys of a processed prompt: its `Budget`, height and width of its images in pixels, its savings.
BUDGET = "ficoco_budget"
SIZES = "ficoco_sizes"
SAVINGS = "ficoco_savings"
# vLLM's request schema may turn an integer into a float, which is exact up to here.
MAX_TRACE_ID = 2**53 - 1


def find_unknown(
    names: Iterable[str], *, explain: bool, windows: bool = False, tower: bool = False
) -> str | None:
    """The first of our fields that a server does not know.

    Args:
        names: names of all fields that the request sets.
        explain: whether the server traces requests.
        windows: whether a request may name the ends of its decision windows.
        tower: whether these are arguments of the tower, where a budget may be a share and a question may come with it.
    """
    allowed = {KEEP, METHOD}
    if tower:
        allowed |= {KEEP_RATIO, QUESTION}
    if explain:
        allowed.add(TRACE)
    if windows:
        allowed.add(WINDOW)
    return min((name for name in names if name.startswith(PREFIX) and name not in allowed), default=None)


def unknown_field(name: str) -> str:
    """Error text for a field that a server does not know."""
    return (
        f"{name} is not a field of this server; allowed: {KEEP}, {METHOD}, in mm_processor_kwargs also {KEEP_RATIO} "
        f"and {QUESTION}"
    )


def find_misplaced(body: Mapping[str, Any]) -> str | None:
    """Path of our field where no server reads it: under a name that resembles it, or inside of another object.

    `extra_body` is a parameter of OpenAI's client, which puts its content into the body; typed into the body itself,
    vLLM would drop it silently. The same holds for `additional_config` and the like.

    Args:
        body: fields of a request's body that vLLM may drop.
    """
    for name, value in body.items():
        if isinstance(value, Mapping) and FIELD in value:
            return f"{name}.{FIELD}"
        if name != FIELD and name.lower().startswith(PREFIX):
            return name
    return None


def misplaced(path: str) -> str:
    """Error text for a field of ours that is not where a server reads it."""
    return (
        f"{path} is not read; allowed: {FIELD} at the top level of the body, for example "
        f'{{"model": ..., "{FIELD}": {{"keep": 64}}}}'
    )


def as_integer(value: Any) -> int | None:
    """The value as an integer; None if it is not one.

    Args:
        value: NumPy's integers are integers. vLLM's request schema may turn an integer into a float.
    """
    if isinstance(value, bool) or not (
        isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    ):
        return None
    return int(value)


def check_keep(value: Any, most: int) -> int:
    """Validate a budget.

    Args:
        value: as the client sent it.
        most: the largest allowed one.

    Raises:
        ValueError: starting with the field, then its value and what is allowed.
    """
    keep = as_integer(value)
    if keep is None or not 1 <= keep <= most:
        raise ValueError(f"{KEEP} = {value!r} is not allowed; allowed: an integer from 1 to {most}")
    return keep


def check_keep_ratio(value: Any) -> float:
    """Validate a budget as a share of the visual tokens of each image.

    Args:
        value: as the client sent it.

    Raises:
        ValueError: starting with the field, then its value and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise ValueError(f"{KEEP_RATIO} = {value!r} is not allowed; allowed: a number above 0, at most 1")
    return float(value)


def check_question(value: Any) -> str:
    """Validate the question about the images.

    Args:
        value: as the client sent it.

    Raises:
        ValueError: starting with the field, then its value and what is allowed.
    """
    if not isinstance(value, str):
        raise ValueError(f"{QUESTION} = {value!r} is not allowed; allowed: a text")
    return value


def check_trace_id(value: Any) -> int:
    """Validate the mark of a request that is to be traced.

    Args:
        value: as the client sent it.

    Raises:
        ValueError: starting with the field, then its value and what is allowed.
    """
    trace_id = as_integer(value)
    if trace_id is None or not 0 <= trace_id <= MAX_TRACE_ID:
        raise ValueError(f"{TRACE} = {value!r} is not allowed; allowed: an integer from 0 to {MAX_TRACE_ID}")
    return trace_id
