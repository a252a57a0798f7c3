"""Attention hint for the first steps: the patches that show each digit of an answer.

Reading a number takes two skills at once, finding the sign and finding the digit; without a hint either can stay at
chance for minutes. The hint acts on two heads of one layer and ends when the decoder grows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ficoco_vllm.benchmarks.questions.questions import ANY, Question
from ficoco_vllm.benchmarks.questions.scene import COLOUR, DIGIT, PLACE
from tools.demo_model.dialogue import AnswerScores, Asker

NUM_HEADS = 2

# Position in the tokens after the image, colour and place of the patches it should attend to.
Hint = tuple[int, int, int]


def answer_hints(asker: Asker, question: Question) -> list[Hint]:
    """Hints for the positions that predict the answer's digits, or its one word."""
    prompt, answer = asker.tokens(question)
    first = len(prompt) - 1 + (answer[0] == asker.space)
    return [(first + index, *where) for index, where in enumerate(question.evidence)]


def evidence_loss(
    scores: AnswerScores,
    questions: Sequence[Sequence[Question]],
    labels: Tensor,
    asker: Asker,
) -> Tensor:
    """Loss of the attention to the hinted patches.

    Args:
        scores: with the attention of the watched layer, every question in a sequence of its own.
        questions: as scored, for every image.
        labels: patch labels of the visual tokens, (B, 4, N), int64.
        asker: for the places of the answers in the sequences.

    Returns:
        Mean over positions and heads of minus the logarithm of the attention on the patches; 0 without any.
    """
    assert scores.log_attention is not None
    rows = [
        (b, q, *hint)
        for b, row in enumerate(questions)
        for q, question in enumerate(row)
        for hint in answer_hints(asker, question)
    ]
    if not rows:
        return torch.zeros(())
    image, question, token, colour, place = torch.from_numpy(np.array(rows)).unbind(1)
    shown = labels[image]
    right = (shown[:, COLOUR] == colour[:, None] + 1) & (shown[:, DIGIT] > 0)
    right &= (shown[:, PLACE] == place[:, None] + 1) | (place[:, None] == ANY)
    known = right.any(dim=1)
    if not known.any():
        return torch.zeros(())
    paid = scores.log_attention[image[known], :NUM_HEADS, question[known], token[known]]
    hidden = torch.where(right[known][:, None], 0.0, -torch.inf)
    return -(paid + hidden).logsumexp(dim=-1).mean()
