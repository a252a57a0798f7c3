"""Sequences of many questions on one image, which share the visual prefix and do not see each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ficoco_vllm.benchmarks.questions.questions import Question
from tools.demo_model.decoder import Decoder
from tools.demo_model.tokenizer import EOS, PAD, PREFIX, word_token

MASKED = -1e9
IGNORED = -100
# The space before a number and the end of the answer are easy to learn.
TRIVIAL_WEIGHT = 0.2


@cache
def block_bias(prefix: int, num_questions: int, length: int) -> Tensor:
    """Causal mask in which a question sees the prefix and itself, (1, 1, T, T), bf16."""
    block = torch.cat([torch.full((prefix,), -1), torch.arange(num_questions).repeat_interleave(length)])
    T = len(block)
    visible = torch.ones(T, T).tril().bool() & ((block[None] == -1) | (block[:, None] == block[None]))
    return torch.zeros(1, 1, T, T).masked_fill_(~visible, MASKED).to(torch.bfloat16)


@dataclass(frozen=True)
class AnswerScores:
    """Scores of every answer token.

    Attributes:
        logits: (n, vocabulary), fp32.
        target: right tokens, (n,), int64.
        owner: image * num_questions + question of each token, (n,), int64.
        log_attention: logarithm of the attention of text to visual tokens at the watched layer, fp32,
            (B, H, sequences after the image, tokens of each, N), or None.
    """

    logits: Tensor
    target: Tensor
    owner: Tensor
    log_attention: Tensor | None = None


class Asker:
    """Turns questions into token sequences and runs the decoder on them.

    Args:
        tokenizer: the demo model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.space = tokenizer(" 0").input_ids[0]
        self._known: dict[Question, tuple[list[int], list[int]]] = {}

    def tokens(self, question: Question) -> tuple[list[int], list[int]]:
        """Prompt after the image, and answer with its end."""
        if question not in self._known:
            prompt = self.tokenizer(f"\n{question.text} ASSISTANT:").input_ids
            self._known[question] = (prompt, [*self.tokenizer(f" {question.answer}").input_ids, EOS])
        return self._known[question]

    def word_ids(self, words: Sequence[str]) -> Tensor:
        """Tokens of "nothing" (the padding) and of each word, (1 + words,), int64."""
        return torch.tensor([PAD, *(word_token(self.tokenizer, word) for word in words)])

    def score(
        self,
        decoder: Decoder,
        visual: Tensor,
        position: Tensor,
        num_positions: int,
        questions: Sequence[Sequence[Question]],
        system: str = "",
        chained: bool = False,
        watch: int | None = None,
    ) -> AnswerScores:
        """Run the decoder with the right answers given (teacher forcing).

        Args:
            decoder: the decoder.
            visual: visual tokens, (B, N, D).
            position: places of the visual tokens, counted from 0, (B, N), int64.
            num_positions: number of places of the image.
            questions: the same number of questions for every image.
            system: text before the first turn.
            chained: the questions are turns of one dialogue, each seeing those before it.
            watch: layer whose attention to the visual tokens is returned too.
        """
        B, N, _ = visual.shape
        Q = len(questions[0])
        prefix = self.tokenizer(system + PREFIX).input_ids
        strands = [self.strands(row, chained) for row in questions]
        start, width = len(prefix), len(strands[0])
        T = max(len(tokens) for row in strands for tokens, _, _ in row)
        ids = np.full((B, width, T), PAD)
        target, owner = np.full((2, B, width, T), IGNORED)
        for b, row in enumerate(strands):
            for w, (tokens, answers, question_index) in enumerate(row):
                ids[b, w, : len(tokens)] = tokens
                target[b, w, : len(tokens)] = answers
                owner[b, w, : len(tokens)] = np.array(question_index) + b * Q
        text = decoder.embedding[torch.from_numpy(ids).view(B, -1)]
        before = decoder.embedding[torch.tensor(prefix)].expand(B, -1, -1)
        x = torch.cat([before.to(visual.dtype), visual, text.to(visual.dtype)], dim=1)
        after = (start + num_positions + torch.arange(T)).repeat(width).expand(B, -1)
        places = torch.cat([torch.arange(start).expand(B, -1), position + start, after], dim=1)
        bias = block_bias(start + N, width, T).to(visual.dtype)
        hidden, watched = decoder(x, places, bias, watch)
        hidden = hidden[:, start + N :]
        right = torch.from_numpy(target).view(B, -1)
        answered = right != IGNORED
        owners = torch.from_numpy(owner).view(B, -1)[answered]
        log_attention = None
        if watched is not None:
            H = watched.shape[1]
            log_attention = watched[:, :, start + N :, start : start + N].reshape(B, H, width, T, N)
        return AnswerScores(decoder.logits(hidden[answered]), right[answered], owners, log_attention)

    def strands(
        self, questions: Sequence[Question], chained: bool
    ) -> list[tuple[list[int], list[int], list[int]]]:
        """Token sequences that follow the image: one for each question, or one dialogue of all.

        Returns:
            Tokens, correct next tokens (IGNORED outside answers) and question indices of each sequence.
        """
        sequences = []
        tokens: list[int] = []
        target: list[int] = []
        owner: list[int] = []
        for index, question in enumerate(questions):
            if not chained:
                tokens, target, owner = [], [], []
            prompt, answer = self.tokens(question)
            if tokens:  # a later turn names its speaker instead of following the image's line break
                prompt = [EOS, *self.tokenizer(f"{PREFIX}{question.text} ASSISTANT:").input_ids]
            tokens += prompt + answer[:-1]
            target += [IGNORED] * (len(prompt) - 1) + answer
            owner += [index] * (len(prompt) + len(answer) - 1)
            if not chained or index == len(questions) - 1:
                sequences.append((tokens, target, owner))
        return sequences

    def loss(self, scores: AnswerScores) -> Tensor:
        """Cross-entropy of the answers, trivial tokens weighted down."""
        trivial = (scores.target == EOS) | (scores.target == self.space)
        weight = torch.where(trivial, TRIVIAL_WEIGHT, 1.0)
        return (F.cross_entropy(scores.logits, scores.target, reduction="none") * weight).sum() / weight.sum()


def right_answers(scores: AnswerScores, questions: Sequence[Sequence[Question]]) -> list[list[bool]]:
    """Whether every token of an answer has the highest score, so that greedy decoding returns it."""
    wrong = set(scores.owner[scores.logits.argmax(-1) != scores.target].tolist())
    Q = len(questions[0])
    return [[b * Q + q not in wrong for q in range(len(row))] for b, row in enumerate(questions)]
