"""Stage 2: the decoder learns to answer what was asked, on visual tokens made of its own word embeddings."""

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.demo_model.architecture import ARCHITECTURE
from benchmarks.demo_model.decoder import Decoder
from benchmarks.demo_model.dialogue import Asker, right_answers
from benchmarks.demo_model.evidence import evidence_loss
from benchmarks.demo_model.muon import Muon
from benchmarks.demo_model.questions import Question, shape_questions, sign_questions
from benchmarks.demo_model.scene import (
    COLOUR,
    COLOUR_NAMES,
    DIGIT,
    KIND,
    KINDS,
    PLACE,
    PLACES,
    SHAPES,
    Shape,
    Sign,
)
from benchmarks.demo_model.signs import TRAINING_NUMBERS
from benchmarks.demo_model.tokenizer import build_tokenizer

ROWS, COLUMNS = 3, 8
SHAPE_SHARE = 0.25
NUM_QUESTIONS = 5
BATCH = 40
NOISE = 0.3
GAP_SHARE = 0.3
NEGATION_DELAY = 150
THREE_DIGITS_AT = 0.93
HINTED_LAYER, HINT_WEIGHT = 2, 0.3
GROW_AT = 0.6
MUON_LR, ADAM_LR = 0.02, 2e-3


class VisualVocabulary:
    """The words that a patch label stands for, as a sum of word embeddings.

    Args:
        asker: for the tokens of the words.
    """

    def __init__(self, asker: Asker) -> None:
        digits = [str(digit) for digit in range(10)]
        self.tables = [asker.word_ids(words) for words in (digits, PLACES, COLOUR_NAMES, KINDS)]

    def embed(self, labels: Tensor, embedding: Tensor) -> Tensor:
        """Aligned visual tokens.

        Args:
            labels: (B, 4, N), int64.
            embedding: word embeddings, (V, D), fp32.

        Returns:
            (B, N, D), fp32; a patch that shows nothing is zero.
        """
        parts = [
            embedding[table][labels[:, row]] * (labels[:, row] > 0)[..., None]
            for row, table in enumerate(self.tables)
        ]
        return torch.stack(parts).sum(0)


@dataclass
class Course:
    """How far the curriculum has come.

    Attributes:
        step: steps made.
        three_digits_since: step at which whole numbers began, or None.
    """

    step: int = 0
    three_digits_since: int | None = None

    @property
    def negated(self) -> float:
        """Share of negated yes/no questions."""
        since = self.three_digits_since
        return 0.0 if since is None or self.step < since + NEGATION_DELAY else 0.5


def made_up_image(rng: random.Random, course: Course) -> tuple[NDArray[np.int64], list[Question]]:
    """Labels of a small grid, (4, ROWS, COLUMNS), and questions on it."""
    labels = np.zeros((4, ROWS, COLUMNS), np.int64)
    if rng.random() < SHAPE_SHARE:
        shape = Shape(rng.randrange(len(COLOUR_NAMES)), rng.randrange(len(SHAPES)))
        h, w = rng.randint(1, ROWS), rng.randint(2, 4)
        y, x = rng.randint(0, ROWS - h), rng.randint(0, COLUMNS - w)
        labels[COLOUR, y : y + h, x : x + w] = shape.colour + 1
        labels[KIND, y : y + h, x : x + w] = shape.shape + 2
        return labels, shape_questions(shape, rng, NUM_QUESTIONS, course.negated)
    short = course.three_digits_since is None
    # One sign alone can be read without heeding the question: leave it out until binding is learnt.
    fewest = 2 if course.three_digits_since is None else 1
    signs = []
    rows = rng.sample(range(ROWS), rng.randint(fewest, ROWS))
    for row, colour in zip(rows, rng.sample(range(len(COLOUR_NAMES)), len(rows)), strict=True):
        number = rng.choice(TRAINING_NUMBERS)[: 1 if short else 3]
        x, width = rng.randint(0, COLUMNS - len(number) - 2), len(number) + 2
        labels[COLOUR, row, x : x + width] = colour + 1
        labels[KIND, row, x : x + width] = 1
        for edge in (x, x + width - 1):
            if rng.random() < 0.3:
                labels[:, row, edge] = 0
        # A lone digit takes any place, lest "first" come to mean "a digit" and bar the way to the others.
        first = rng.randrange(len(PLACES)) if short else 0
        for index, digit in enumerate(number):
            labels[DIGIT, row, x + 1 + index] = int(digit) + 1
            labels[PLACE, row, x + 1 + index] = first + index + 1
        signs.append(Sign(colour, number))
    return labels, sign_questions(tuple(signs), rng, NUM_QUESTIONS)


def made_up_positions(rng: random.Random, course: Course) -> tuple[Tensor, int]:
    """Places of the grid's tokens for a batch: one after another, or anywhere in a full image, in order."""
    N = ROWS * COLUMNS
    if course.three_digits_since is not None and rng.random() < GAP_SHARE:
        chosen = torch.rand(BATCH, ARCHITECTURE.num_patches).topk(N, dim=1).indices
        return chosen.sort(dim=1).values, ARCHITECTURE.num_patches
    return torch.arange(N).expand(BATCH, -1), N


def running_accuracy(
    running: dict[str, float],
    verdicts: list[list[bool]],
    questions: Sequence[Sequence[Question]],
    keep: float = 0.95,
) -> None:
    """Fold a batch's accuracy, by kind of question, into an exponential average, in place."""
    found: dict[str, list[bool]] = {}
    for row, asked in zip(verdicts, questions, strict=True):
        bound = sum(question.kind == "number_by_colour" for question in asked) > 1
        for verdict, question in zip(row, asked, strict=True):
            kind = question.kind
            if kind == "number_by_colour" and bound:
                kind = f"binding_{len(question.answer)}"
            if kind == "yes_no_shapes" and (" not " in question.text or " no " in question.text):
                kind = "yes_no_negated"
            found.setdefault(kind, []).append(verdict)
    for kind, values in found.items():
        share = sum(values) / len(values)
        running[kind] = keep * running.get(kind, share) + (1 - keep) * share


def optimizers(decoder: Decoder, others: list[nn.Parameter]) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices inside the layers, AdamW for all else."""
    muon = Muon(decoder.matrices(), lr=MUON_LR)
    inside = {id(param) for group in decoder.matrices() for param in group.params}
    rest = [param for param in decoder.parameters() if id(param) not in inside] + others
    adam = torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return muon, adam


def set_rates(muon: Muon, adam: torch.optim.AdamW, muon_lr: float, adam_lr: float) -> None:
    """Set both learning rates."""
    for group in muon.param_groups:
        group["lr"] = muon_lr
    for group in adam.param_groups:
        group["lr"] = adam_lr


def train_synthetic(work: Path, seconds: float, seed: int = 2) -> None:
    """Train the decoder for a given time and leave `synthetic.pt` in the work folder.

    It begins with half the layers, which learns twice as fast, and grows to all of them on the way.

    Args:
        work: folder of checkpoints; a `synthetic.pt` that is there is continued.
        seconds: time for this stage.
        seed: for weights and scenes.
    """
    torch.manual_seed(seed)
    asker = Asker(build_tokenizer())
    vocabulary = VisualVocabulary(asker)
    decoder = Decoder(len(asker.tokenizer), ARCHITECTURE.decoder_layers // 2)
    path, course, spent = work / "synthetic.pt", Course(), 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["num_layers"] > len(decoder.layers):
            decoder.grow()
        decoder.load_state_dict(saved["decoder"])
        course, spent = Course(saved["step"], saved["three_digits_since"]), saved["spent"]
    muon, adam = optimizers(decoder, [])
    warm_from = course.step
    rng = random.Random(seed + course.step)
    running: dict[str, float] = {}
    begin = time.monotonic() - spent
    first = course.step
    with tqdm(total=round(seconds), initial=round(spent), unit="s", desc="synthetic") as bar:
        while (spent := time.monotonic() - begin) < seconds:
            if spent > GROW_AT * seconds and len(decoder.layers) < ARCHITECTURE.decoder_layers:
                decoder.grow()
                muon, adam = optimizers(decoder, [])
                warm_from = course.step
            scale = min(1.0, (course.step - warm_from + 1) / 50, max(0.05, (1 - spent / seconds) / 0.25))
            set_rates(muon, adam, MUON_LR * scale, ADAM_LR * scale)
            grids, questions = zip(*(made_up_image(rng, course) for _ in range(BATCH)), strict=True)
            labels = torch.from_numpy(np.stack(grids)).flatten(2)
            clean = vocabulary.embed(labels, decoder.embedding)
            noise = NOISE * decoder.embedding.detach().std() * torch.randn_like(clean)
            position, num_positions = made_up_positions(rng, course)
            visual = (clean + noise).to(torch.bfloat16)
            hinted = len(decoder.layers) < ARCHITECTURE.decoder_layers
            watch = HINTED_LAYER if hinted else None
            scores = asker.score(decoder, visual, position, num_positions, questions, watch=watch)
            loss = asker.loss(scores)
            if hinted:
                loss = loss + HINT_WEIGHT * evidence_loss(scores, questions, labels, asker.space)
            muon.zero_grad()
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            muon.step()
            adam.step()
            course.step += 1
            running_accuracy(running, right_answers(scores, questions), questions)
            running["loss"] = 0.95 * running.get("loss", loss.item()) + 0.05 * loss.item()
            if course.three_digits_since is None and running.get("binding_1", 0) > THREE_DIGITS_AT:
                course.three_digits_since = course.step
            if course.step % 50 == 0:
                bar.update(round(spent) - bar.n)
                rate = BATCH * (course.step - first) / (time.monotonic() - begin)
                shown = " ".join(f"{kind}={value:.3f}" for kind, value in sorted(running.items()))
                bar.write(f"synthetic {course.step} {len(decoder.layers)} layers {rate:.0f} images/s {shown}")
            if course.step % 400 == 0:
                save(path, decoder, course, spent)
    save(path, decoder, course, seconds)


def save(path: Path, decoder: Decoder, course: Course, spent: float) -> None:
    """Write the decoder and how far the curriculum has come."""
    state = {"decoder": decoder.state_dict(), "num_layers": len(decoder.layers), "spent": spent}
    torch.save(state | asdict(course), path)
