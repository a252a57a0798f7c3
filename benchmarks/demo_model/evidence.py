"""A hint for the first steps: where in the image each digit of an answer is to be read.

Reading a number takes two leaps at once, which sign and which digit, and without a hint either can stay at
chance for minutes. The hint acts on two heads of one layer and is withdrawn when the decoder grows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo_model.dialogue import AnswerScores
from benchmarks.demo_model.questions import ANY, Question
from benchmarks.demo_model.scene import COLOUR, DIGIT, PLACE
from benchmarks.demo_model.tokenizer import EOS

NUM_HEADS = 2
UNKNOWN = -2


def evidence_loss(
    scores: AnswerScores, questions: Sequence[Sequence[Question]], labels: Tensor, space: int
) -> Tensor:
    """How little attention goes to the patches from which an answer is read.

    Args:
        scores: with the attention of the watched layer.
        questions: as scored, for every image.
        labels: patch labels of the visual tokens, (B, 4, N), int64.
        space: the token before a number, which is read from nowhere.

    Returns:
        Mean over tokens and heads of minus the logarithm of the attention on the evidence.
    """
    assert scores.log_attention is not None
    wanted = np.full((len(scores.owner), 2), UNKNOWN)
    flat = [question for row in questions for question in row]
    used = [0] * len(flat)
    for index, (owner, token) in enumerate(zip(scores.owner.tolist(), scores.target.tolist(), strict=True)):
        evidence = flat[owner].evidence
        if token in (space, EOS) or used[owner] >= len(evidence):
            continue
        wanted[index] = evidence[used[owner]]
        used[owner] += 1
    colour, place = torch.from_numpy(wanted).unbind(1)
    shown = labels[scores.owner // len(questions[0])]
    right = (shown[:, COLOUR] == colour[:, None] + 1) & (shown[:, DIGIT] > 0)
    right &= (shown[:, PLACE] == place[:, None] + 1) | (place[:, None] == ANY)
    known = right.any(dim=1)
    hidden = torch.where(right[known][:, None], 0.0, -torch.inf)
    return -(scores.log_attention[known, :NUM_HEADS] + hidden).logsumexp(dim=-1).mean()
