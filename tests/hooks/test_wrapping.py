"""Wrapped methods of classes and of single objects."""

import asyncio
import inspect
from functools import partial
from typing import Any

import pytest

from ficoco_vllm.hooks.wrapping import replace, wrap


class Owner:
    """Stands for a class of vLLM's."""

    factor = 2

    def double(self, value: int) -> int:
        """Doc."""
        return value * self.factor

    async def later(self, value: int) -> int:
        return value * self.factor


@pytest.fixture
def owner() -> Any:
    """A class of its own for each test."""
    return type("Copy", (), dict(vars(Owner)))


def plus_one(original: Any, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs) + 1


async def plus_one_later(original: Any, *args: Any, **kwargs: Any) -> Any:
    return await original(*args, **kwargs) + 1


def test_a_class_passes_self_and_an_object_does_not(owner: Any) -> None:
    seen: list[tuple[Any, ...]] = []

    def note(original: Any, *args: Any) -> Any:
        seen.append(args)
        return original(*args)

    first, second = owner(), owner()
    wrap(owner, "double", note)
    assert first.double(1) == 2
    wrap(first, "double", partial(note))
    assert first.double(3) == 6
    assert second.double(4) == 8
    assert seen == [(first, 1), (3,), (first, 3), (second, 4)]


def test_idempotent_for_the_same_function_only(owner: Any) -> None:
    for _ in range(3):
        wrap(owner, "double", plus_one)
    assert owner().double(1) == 3
    wrap(owner, "double", lambda original, *args: original(*args) * 10)
    wrap(owner, "double", plus_one)
    assert owner().double(1) == 30


def test_coroutine_functions_stay_such(owner: Any) -> None:
    wrap(owner, "later", plus_one_later)
    assert inspect.iscoroutinefunction(owner.later)
    one = owner()
    wrap(one, "later", plus_one_later)  # the class has it
    assert asyncio.run(one.later(2)) == 5


def test_name_and_signature_stay(owner: Any) -> None:
    original = owner.double
    wrap(owner, "double", plus_one)
    assert (owner.double.__name__, owner.double.__doc__) == ("double", "Doc.")
    assert inspect.signature(owner.double) == inspect.signature(original)


def test_replace(owner: Any) -> None:
    replace(owner, "factor", 5)
    assert owner().double(1) == 5
    with pytest.raises(AttributeError):
        replace(owner, "factors", 5)
