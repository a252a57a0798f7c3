"""How an answer is held against an oracle's."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ficoco_vllm.demo_model import examples

END = 2  # the end token of all models of the tests

# float32 against float64, or float32 against float32 with other shapes and so other orders of summation.
TOLERANCE = 1e-4
# How many tokens are asked for. An answer of the demo model ends before; what it says behind its end it never learnt.
NUM_TOKENS = 6


def demo_questions() -> list[tuple[str, Image.Image]]:
    """What the demo model can answer: each of its example images with its own question, as a prompt."""
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
    tokens: Sequence[int], logprobs: Tensor, expected: Sequence[int], expected_logprobs: Tensor, ends: bool
) -> None:
    """Equal greedy tokens, and log-probabilities within `TOLERANCE` whatever their size.

    Args:
        tokens: of the answer.
        logprobs: (tokens, vocabulary).
        expected: the oracle's.
        expected_logprobs: the oracle's.
        ends: whether the model has learnt to end, so that what follows is not looked at.
    """
    length = answer_length(expected, ends)
    assert list(tokens[:length]) == list(expected[:length])
    torch.testing.assert_close(
        logprobs[:length].double(), expected_logprobs[:length].double(), atol=TOLERANCE, rtol=0
    )
