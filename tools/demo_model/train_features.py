"""Stages 3 and 4: projector and decoder on the tower's features, first on some tokens, then on all."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ficoco_vllm.benchmarks.questions.questions import Question
from ficoco_vllm.benchmarks.questions.scene import KIND, Shape, Sign
from tools.demo_model.architecture import ARCHITECTURE
from tools.demo_model.decoder import Decoder, Projector
from tools.demo_model.dialogue import Asker, right_answers
from tools.demo_model.features import Features, choose_tokens, load_or_collect
from tools.demo_model.steps import Optimizers, Stage
from tools.demo_model.synthetic import VisualVocabulary
from tools.demo_model.tokenizer import build_tokenizer
from tools.demo_model.training_questions import shape_questions, sign_questions
from tools.demo_model.vision import VisionTower

NUM_QUESTIONS = 5
NUM_POSITIONS = ARCHITECTURE.num_patches
SHAPE_SHARE = 0.3
ALIGN_WEIGHT = 0.1
FIT_STEPS, FIT_BATCH, FIT_LR = 800, 2048, 3e-3
SYSTEM_SHARE, CHAIN_SHARE = 0.1, 0.15
SYSTEM_MESSAGES = ("Answer the question. ", "You are a helpful assistant. ", "Be brief. ")


@dataclass(frozen=True)
class Phase:
    """One stage of training on features.

    Attributes:
        name: name of its checkpoint.
        tokens: counts of visual tokens to choose from.
        rows: approximate number of visual and text tokens in a step.
        muon_lr: peak learning rate of the layers' matrices.
        adam_lr: peak learning rate of the rest.
    """

    name: str
    tokens: tuple[int, ...]
    rows: int
    muon_lr: float
    adam_lr: float


SUBSETS = Phase("subsets", (64, 96, 128, 128, 192, 256), 7000, 0.008, 1e-3)
ALL_TOKENS = Phase("all_tokens", (128, 256, 576, 576, 576, 576), 7000, 0.004, 5e-4)


def fit_projector(
    projector: Projector, features: Features, vocabulary: VisualVocabulary, embedding: Tensor
) -> float:
    """Regress the projector onto the sums of word embeddings that stage 2 used, in seconds.

    Args:
        projector: changed in place.
        features: training features.
        vocabulary: embeds the labels.
        embedding: the decoder's word embeddings, (V, D), fp32.

    Returns:
        The last error as a share of the targets' variance.
    """
    x = features.patches.flatten(0, 1)
    labels = features.labels.transpose(1, 2).flatten(0, 1)
    shown, empty = (labels[:, KIND] > 0).nonzero()[:, 0], (labels[:, KIND] == 0).nonzero()[:, 0]
    some = x[shown[:20000]].float()
    with torch.no_grad():  # begin with inputs of unit size
        projector.first.weight.div_(some.std(0))
        projector.first.bias.sub_(projector.first.weight @ some.mean(0))
    adam = torch.optim.AdamW(projector.parameters(), lr=FIT_LR, weight_decay=0.0)
    error = torch.tensor(0.0)
    for step in range(FIT_STEPS):
        adam.param_groups[0]["lr"] = FIT_LR * (1 - step / FIT_STEPS) + 1e-5
        picks = [
            part[torch.randint(len(part), (count,))]
            for part, count in ((shown, FIT_BATCH * 3 // 4), (empty, FIT_BATCH // 4))
        ]
        index = torch.cat(picks)
        target = vocabulary.embed(labels[index].T[None].long(), embedding)[0]
        error = F.mse_loss(projector(x[index].float()), target) / target.var()
        adam.zero_grad()
        error.backward()
        adam.step()
    return error.item()


def ask_about(shown: Sequence[tuple[Sign, ...] | Shape], rng: random.Random) -> list[list[Question]]:
    """Training questions for every image of a batch."""
    return [
        shape_questions(what, rng, NUM_QUESTIONS)
        if isinstance(what, Shape)
        else sign_questions(what, rng, NUM_QUESTIONS)
        for what in shown
    ]


def train_features(work: Path, phase: Phase, seconds: float, num_images: int, seed: int) -> None:
    """Train projector and decoder for a given time and write `<phase>.pt` to the work folder.

    Args:
        work: folder with the earlier stages' checkpoints; an existing `<phase>.pt` is continued.
        phase: one of the two stages.
        seconds: time for the steps.
        num_images: training images whose features are kept.
        seed: for images, questions and subsets.
    """
    torch.manual_seed(seed)
    asker = Asker(build_tokenizer())
    vocabulary = VisualVocabulary(asker)
    tower = VisionTower()
    tower.load_state_dict(torch.load(work / "vision.pt")["tower"])
    features = load_or_collect(work / "features.pt", tower, num_images, SHAPE_SHARE, seed)
    projector = Projector()
    decoder = Decoder(len(asker.tokenizer), ARCHITECTURE.decoder_layers // 2)
    decoder.grow()
    path, before = work / f"{phase.name}.pt", work / "subsets.pt"

    def save(stage: Stage) -> None:
        parts = {"projector": projector.state_dict(), "decoder": decoder.state_dict()}
        torch.save(parts | {"step": stage.step, "spent": stage.spent}, path)

    stage = Stage(phase.name, seconds, save, save_every=200)
    if path.exists() or before.exists():
        saved = torch.load(path if path.exists() else before)
        projector.load_state_dict(saved["projector"])
        decoder.load_state_dict(saved["decoder"])
        if path.exists():
            stage.step, stage.spent = saved["step"], saved["spent"]
    else:
        decoder.load_state_dict(torch.load(work / "synthetic.pt")["decoder"])
        error = fit_projector(projector, features, vocabulary, decoder.embedding.detach())
        tqdm.write(f"projector fitted, error {error:.3f} of the variance")
    optimizers = Optimizers(decoder, list(projector.parameters()))
    params = [*decoder.parameters(), *projector.parameters()]
    first, rng = stage.step, random.Random(seed + 1000 * stage.step)
    for progress in stage:
        scale = min(1.0, (stage.step - first + 1) / 20) * max(0.03, 1 - progress)
        num_tokens = rng.choice(phase.tokens)
        batch = max(6, phase.rows // (num_tokens + 18 * NUM_QUESTIONS))
        index = torch.tensor([rng.randrange(len(features)) for _ in range(batch)])
        labels = features.labels[index]
        kept = choose_tokens(labels, num_tokens)
        labels = labels.gather(2, kept[:, None].expand(-1, 4, -1)).long()
        patches = features.patches[index[:, None], kept]
        questions = ask_about([features.shown[i] for i in index.tolist()], rng)
        whole = rng.random() < 0.5 or num_tokens == NUM_POSITIONS
        position = kept if whole else torch.arange(num_tokens).expand(batch, -1)
        visual = projector(patches)
        scores = asker.score(
            decoder,
            visual,
            position,
            NUM_POSITIONS if whole else num_tokens,
            questions,
            system=rng.choice(SYSTEM_MESSAGES) if rng.random() < SYSTEM_SHARE else "",
            chained=rng.random() < CHAIN_SHARE,
        )
        target = vocabulary.embed(labels, decoder.embedding.detach())
        align = F.mse_loss(visual.float(), target) / target.var()
        loss = asker.loss(scores)
        rates = (phase.muon_lr * scale, phase.adam_lr * scale)
        optimizers.step(loss + ALIGN_WEIGHT * align, *rates, params)
        stage.images += batch
        stage.average_accuracy(right_answers(scores, questions), questions)
        stage.average("loss", loss.item())
        stage.average("align", align.item())
