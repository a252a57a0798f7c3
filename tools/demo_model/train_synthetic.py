"""Stage 2: the decoder learns to answer questions on visual tokens made of its own word embeddings."""

import random
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from tools.demo_model.architecture import ARCHITECTURE
from tools.demo_model.decoder import Decoder
from tools.demo_model.dialogue import Asker, right_answers
from tools.demo_model.evidence import evidence_loss
from tools.demo_model.steps import optimizers, running_accuracy, set_rates
from tools.demo_model.synthetic import (
    Course,
    VisualVocabulary,
    made_up_image,
    made_up_positions,
)
from tools.demo_model.tokenizer import build_tokenizer

BATCH = 40
NOISE = 0.3
THREE_DIGITS_AT = 0.93
HINTED_LAYER, HINT_WEIGHT = 2, 0.3
GROW_AT = 0.6
MUON_LR, ADAM_LR = 0.02, 2e-3


def train_synthetic(work: Path, seconds: float, seed: int = 2) -> None:
    """Train the decoder for a given time and write `synthetic.pt` to the work folder.

    It starts with half of the layers, which learns twice as fast, and grows to all of them during the stage.

    Args:
        work: folder of checkpoints; an existing `synthetic.pt` is continued.
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
    started = time.monotonic()
    begin = started - spent
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
            position, num_positions = made_up_positions(rng, course, BATCH)
            visual = (clean + noise).to(torch.bfloat16)
            hinted = len(decoder.layers) < ARCHITECTURE.decoder_layers
            watch = HINTED_LAYER if hinted else None
            scores = asker.score(decoder, visual, position, num_positions, questions, watch=watch)
            loss = asker.loss(scores)
            if hinted:
                loss = loss + HINT_WEIGHT * evidence_loss(scores, questions, labels, asker)
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
                rate = BATCH * (course.step - first) / (time.monotonic() - started)
                shown = " ".join(f"{kind}={value:.3f}" for kind, value in sorted(running.items()))
                bar.write(f"synthetic {course.step} {len(decoder.layers)} layers {rate:.0f} images/s {shown}")
            if course.step % 400 == 0:
                save(path, decoder, course, spent)
    save(path, decoder, course, seconds)


def save(path: Path, decoder: Decoder, course: Course, spent: float) -> None:
    """Write the decoder and the progress of the curriculum."""
    state = {"decoder": decoder.state_dict(), "num_layers": len(decoder.layers), "spent": spent}
    torch.save(state | asdict(course), path)
