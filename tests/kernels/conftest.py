"""Both implementations of every op, against references in float64.

The Triton kernels run on a GPU, or in Triton's interpreter where TRITON_INTERPRET=1: the second run of `make test`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ficoco_vllm.kernels import Backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FOLDER = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the run in Triton's interpreter."""
    for item in items:
        if item.path.parent == FOLDER and not item.get_closest_marker("compiler"):
            item.add_marker(pytest.mark.interpreter)


def needs_triton() -> None:
    """Skips a test of the kernels where they cannot run."""
    if not INTERPRETED and DEVICE == "cpu":
        pytest.skip("the Triton kernels need a GPU or TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def hidden_overflows() -> Iterator[None]:
    """Masked values may overflow before the mask: NumPy warns of that, a GPU does not."""
    before = np.seterr(over="ignore", invalid="ignore")
    yield
    np.seterr(**before)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter multiply bfloat16: Triton 3.9's multiplies the bit patterns as integers."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def product(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return plain(self, widened(a), widened(b), *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each implementation; memory that the kernels allocate holds NaN until they write it."""
    if request.param == "torch":
        yield "torch"
        return
    needs_triton()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        yield "triton"
    finally:
        torch.use_deterministic_algorithms(before)
