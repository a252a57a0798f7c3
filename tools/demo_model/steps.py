"""Shared parts of the training stages: time, progress and checkpoints, optimizers, running accuracy."""

import time
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm

from ficoco_vllm.benchmarks.questions.questions import Question
from ficoco_vllm.benchmarks.questions.shapes import is_negated
from tools.demo_model.decoder import Decoder
from tools.demo_model.muon import Muon
from tools.demo_model.vision import VisionTower

LOG_EVERY = 50
# Share of an exponential average that stays at each step.
MEMORY = 0.95


class Stage:
    """Steps of one stage, as many as fit into its time; iterated, it yields the share of the time that has passed.

    Args:
        name: for the log.
        seconds: duration of the whole stage.
        save: writes a checkpoint.
        save_every: steps between two checkpoints.

    Attributes:
        step: steps made, those of earlier runs included.
        spent: seconds, those of earlier runs included.
        images: seen in this run.
        running: exponential averages for the log, by name.
    """

    def __init__(self, name: str, seconds: float, save: Callable[["Stage"], None], save_every: int) -> None:
        self.name, self.seconds, self.save, self.save_every = name, seconds, save, save_every
        self.step, self.spent, self.images = 0, 0.0, 0
        self.running: dict[str, float] = {}

    def __iter__(self) -> Iterator[float]:
        started = time.monotonic()
        begin = started - self.spent
        with tqdm(total=round(self.seconds), initial=round(self.spent), unit="s", desc=self.name) as bar:
            while (spent := time.monotonic() - begin) < self.seconds:
                self.spent = spent
                yield spent / self.seconds
                self.step += 1
                if self.step % LOG_EVERY == 0:
                    bar.update(round(spent) - bar.n)
                    shown = " ".join(f"{name}={value:.3f}" for name, value in sorted(self.running.items()))
                    rate = self.images / (time.monotonic() - started)
                    bar.write(f"{self.name} {self.step} {rate:.0f} images/s {shown}")
                if self.step % self.save_every == 0:
                    self.save(self)
        self.spent = self.seconds
        self.save(self)

    def average(self, name: str, value: float) -> None:
        """Fold a value into the exponential average of its name."""
        self.running[name] = MEMORY * self.running.get(name, value) + (1 - MEMORY) * value

    def average_accuracy(self, verdicts: list[list[bool]], questions: Sequence[Sequence[Question]]) -> None:
        """Fold a batch's accuracy, by kind of question, into the averages."""
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
            self.average(kind, sum(values) / len(values))


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for all other parameters."""

    def __init__(self, module: Decoder | VisionTower, others: Sequence[nn.Parameter] = ()) -> None:
        self.muon = Muon(module.matrices(), lr=0.0)
        inside = {id(param) for group in module.matrices() for param in group.params}
        self.rest = [param for param in module.parameters() if id(param) not in inside] + list(others)
        self.adam = AdamW(self.rest, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def step(self, loss: Tensor, muon_lr: float, adam_lr: float, clipped: Sequence[nn.Parameter]) -> None:
        """Make one step, with the gradients of some parameters clipped to norm 1."""
        for optimizer, rate in ((self.muon, muon_lr), (self.adam, adam_lr)):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss.backward()
        nn.utils.clip_grad_norm_(clipped, 1.0)
        self.muon.step()
        self.adam.step()
