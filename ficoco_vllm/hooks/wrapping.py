"""The two ways in which this package changes objects of other packages; `table.py` lists every place."""

from collections.abc import Callable
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any

# On a wrapper: the functions that are called around the original, innermost first.
_AROUND = "ficoco_around"


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Call a function of ours in place of a method. Idempotent for the same owner, name and function.

    Args:
        owner: a class, for all its instances, or one object.
        name: the method, plain or a coroutine function.
        around: called as `around(original, *args, **kwargs)`. The arguments start with `self` where the owner is a
            class; the original is bound where it is an object. A coroutine function if the method is one.
    """
    original = getattr(owner, name)
    applied = getattr(original, _AROUND, ())
    if around in applied:
        return

    if iscoroutinefunction(original):

        @wraps(original)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return await around(original, *args, **kwargs)

    else:

        @wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

    setattr(wrapper, _AROUND, (*applied, around))
    setattr(owner, name, wrapper)


def replace(owner: Any, name: str, value: Any) -> None:
    """Put a value of ours in the place of an existing attribute.

    Args:
        owner: a module, class or object.
        name: the attribute.
        value: the new value.

    Raises:
        AttributeError: the owner has no such attribute.
    """
    getattr(owner, name)
    setattr(owner, name, value)
