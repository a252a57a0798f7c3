"""Stage 2: the decoder learns to answer questions on visual tokens made of its own word embeddings."""

import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from tools.demo_model.architecture import ARCHITECTURE
from tools.demo_model.decoder import Decoder
from tools.demo_model.dialogue import Asker, right_answers
from tools.demo_model.evidence import evidence_loss
from tools.demo_model.steps import Optimizers, Stage
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
    path, course = work / "synthetic.pt", Course()

    def save(stage: Stage) -> None:
        state = {"decoder": decoder.state_dict(), "num_layers": len(decoder.layers), "spent": stage.spent}
        torch.save(state | asdict(course), path)

    stage = Stage("synthetic", seconds, save, save_every=400)
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["num_layers"] > len(decoder.layers):
            decoder.grow()
        decoder.load_state_dict(saved["decoder"])
        course = Course(saved["step"], saved["three_digits_since"])
        stage.step, stage.spent = saved["step"], saved["spent"]
    optimizers, warm_from, rng = Optimizers(decoder), course.step, random.Random(seed + course.step)
    for progress in stage:
        hinted = len(decoder.layers) < ARCHITECTURE.decoder_layers
        if hinted and progress > GROW_AT:
            decoder.grow()
            optimizers, warm_from, hinted = Optimizers(decoder), course.step, False
        scale = min(1.0, (course.step - warm_from + 1) / 50, max(0.05, (1 - progress) / 0.25))
        grids, questions = zip(*(made_up_image(rng, course) for _ in range(BATCH)), strict=True)
        labels = torch.from_numpy(np.stack(grids)).flatten(2)
        clean = vocabulary.embed(labels, decoder.embedding)
        noise = NOISE * decoder.embedding.detach().std() * torch.randn_like(clean)
        position, num_positions = made_up_positions(rng, course, BATCH)
        visual = (clean + noise).to(torch.bfloat16)
        watch = HINTED_LAYER if hinted else None
        scores = asker.score(decoder, visual, position, num_positions, questions, watch=watch)
        loss = asker.loss(scores)
        if hinted:
            loss = loss + HINT_WEIGHT * evidence_loss(scores, questions, labels, asker)
        optimizers.step(loss, MUON_LR * scale, ADAM_LR * scale, list(decoder.parameters()))
        course.step += 1
        stage.images += BATCH
        stage.average_accuracy(right_answers(scores, questions), questions)
        stage.average("loss", loss.item())
        stage.running["layers"] = len(decoder.layers)
        if course.three_digits_since is None and stage.running.get("binding_1", 0) > THREE_DIGITS_AT:
            course.three_digits_since = course.step
