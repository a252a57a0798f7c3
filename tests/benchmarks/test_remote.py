"""The process of a benchmark's engine, when it fails or dies."""

import os
from contextlib import nullcontext
from typing import NoReturn

import pytest

from ficoco_vllm.benchmarks.harness.engine import remote


def fail(held: None) -> NoReturn:
    raise ValueError("no such layer")


def die(held: None) -> NoReturn:
    os._exit(9)  # as if the system had no memory left


def test_an_error_has_the_traceback_of_the_other_process_and_a_death_is_an_error() -> None:
    with remote(nullcontext, {}) as process:
        with pytest.raises(RuntimeError, match=r"in fail\n(.|\n)*ValueError: no such layer"):
            process.call(fail)
        assert process.call(bool) is False, "the process is still there"
        with pytest.raises(RuntimeError, match="the process ended without an answer"):
            process.call(die)
