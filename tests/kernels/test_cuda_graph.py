"""The kernels inside a CUDA graph: captured once, replayed on other data."""

import pytest
import torch

from tests.kernels.conftest import INTERPRETED
from tests.kernels.test_custom_ops import inputs, reduction

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_replay() -> None:
    x = inputs()
    arguments = [x[name] for name in ("query", "key", "tokens", "weight", "position", "text")]
    reduce = reduction("triton")
    reduce(*arguments)  # compiles the kernels, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = reduce(*arguments)
    arguments[0].copy_(torch.randn_like(arguments[0]))
    arguments[2].copy_(torch.randn_like(arguments[2]))
    graph.replay()
    torch.testing.assert_close(captured, reduce(*arguments), rtol=0, atol=0)
