"""The three ways in which this package changes objects of other packages; `table.py` lists each place."""

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
            class; the original is bound where it is an object. May be a coroutine function if the method is one.
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


def swap_class(instance: Any, cls: type) -> None:
    """Give an object that another package has built a class of ours. Idempotent.

    Args:
        instance: keeps all its state.
        cls: derived directly from the object's class, without state of its own.

    Raises:
        TypeError: the object's class is another one, whose behaviour would be lost.
    """
    if type(instance) not in (cls, *cls.__bases__):
        raise TypeError(f"{cls.__name__} replaces {cls.__bases__[0].__name__}, not {type(instance).__name__}")
    instance.__class__ = cls
