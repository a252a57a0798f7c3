"""Helpers of the decoder's stages: optimizers, learning rates, running accuracy."""

from collections.abc import Sequence

import torch
from torch import nn

from ficoco_vllm.benchmarks.questions.questions import Question
from ficoco_vllm.benchmarks.questions.shapes import is_negated
from tools.demo_model.decoder import Decoder
from tools.demo_model.muon import Muon


def running_accuracy(
    running: dict[str, float],
    verdicts: list[list[bool]],
    questions: Sequence[Sequence[Question]],
    keep: float = 0.95,
) -> None:
    """Fold a batch's accuracy, by kind of question, into an exponential average, in place."""
    by_kind: dict[str, list[bool]] = {}
    for row, batch in zip(verdicts, questions, strict=True):
        bound = sum(question.kind == "number_by_colour" for question in batch) > 1
        for verdict, question in zip(row, batch, strict=True):
            kind = question.kind
            if kind == "number_by_colour" and bound:
                kind = f"binding_{len(question.answer)}"
            if kind == "yes_no_shapes" and is_negated(question.text):
                kind = "yes_no_negated"
            by_kind.setdefault(kind, []).append(verdict)
    for kind, values in by_kind.items():
        share = sum(values) / len(values)
        running[kind] = keep * running.get(kind, share) + (1 - keep) * share


def optimizers(decoder: Decoder, others: list[nn.Parameter]) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices inside the layers, AdamW for all other parameters; `set_rates` sets their rates."""
    muon = Muon(decoder.matrices(), lr=0.0)
    inside = {id(param) for group in decoder.matrices() for param in group.params}
    rest = [param for param in decoder.parameters() if id(param) not in inside] + others
    adam = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return muon, adam


def set_rates(muon: Muon, adam: torch.optim.AdamW, muon_lr: float, adam_lr: float) -> None:
    """Set both learning rates."""
    for group in muon.param_groups:
        group["lr"] = muon_lr
    for group in adam.param_groups:
        group["lr"] = adam_lr
