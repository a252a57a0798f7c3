"""Comparison of an answer with an oracle's."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from ficoco_vllm.demo_model import examples

END = 2  # the end token of all models of the tests

# float32 against float64, or float32 against float32 with other shapes and so other orders of summation.
TOLERANCE = 1e-4
# Where the trained weights magnify rounding beyond that: ours may be so many times as far off as the oracle itself is
# when it computes in float32. Measured: 1.3e-4 against 0.7e-4, where FiCoCo-L leaves a digit hard to read.
ROUNDINGS = 3
# Requested number of tokens. An answer of the demo model ends before; it was not trained to continue after its end.
NUM_TOKENS = 6


def demo_questions() -> list[tuple[str, Image.Image]]:
    """Prompts that the demo model can answer: each of its example images with its own question."""
    return [
        (f"<s>USER: <image>\n{example.question} ASSISTANT:", Image.open(example.image).convert("RGB"))
        for example in examples()
    ]


def answer_length(tokens: Sequence[int], ends: bool) -> int:
    """Tokens of an answer, its end included.

    Args:
        tokens: of the answer, which was not stopped at its end.
        ends: whether the model has learnt to end.
    """
    return tokens.index(END) + 1 if ends and END in tokens else len(tokens)


def assert_equal(
    tokens: Sequence[int],
    logprobs: Tensor,
    expected: Sequence[int],
    expected_logprobs: Tensor,
    ends: bool,
    in_float32: Callable[[], Tensor] | None = None,
) -> None:
    """Equal greedy tokens, and log-probabilities within `TOLERANCE`, independent of their size.

    Args:
        tokens: of the answer.
        logprobs: (tokens, vocabulary).
        expected: the oracle's.
        expected_logprobs: the oracle's.
        ends: whether the model has learnt to end, so that what follows is not looked at.
        in_float32: what the oracle says of the same tokens when it computes in float32; see `ROUNDINGS`.
    """
    length = answer_length(expected, ends)
    assert list(tokens[:length]) == list(expected[:length])
    exact = expected_logprobs[:length].double()
    tolerance = TOLERANCE
    if in_float32 is not None and (logprobs[:length] - exact).abs().max() > TOLERANCE:
        tolerance = max(TOLERANCE, ROUNDINGS * float((in_float32()[:length] - exact).abs().max()))
    torch.testing.assert_close(logprobs[:length].double(), exact, atol=tolerance, rtol=0)
