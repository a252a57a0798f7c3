"""Stage 1: the vision tower learns to carry digits, places, colours and kinds in its patches."""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.demo_model.architecture import ARCHITECTURE
from benchmarks.demo_model.muon import Muon
from benchmarks.demo_model.pixels import to_patches
from benchmarks.demo_model.scene import COLOUR_NAMES, KINDS, NUM_CLASSES, PLACES, Scene
from benchmarks.demo_model.shapes import EasyVqa
from benchmarks.demo_model.signs import TRAINING_NUMBERS, render_signs
from benchmarks.demo_model.vision import VisionHeads, VisionTower

P = ARCHITECTURE.patch_size
NUM_DIGIT_FLAGS = 10 * len(PLACES)
NUM_FLAGS = len(COLOUR_NAMES) + len(KINDS) + NUM_DIGIT_FLAGS
MAX_SIGNS = 3
BACKGROUND_WEIGHT = 0.15


@dataclass(frozen=True)
class Window:
    """What one training step shows: `batch` windows of rows x columns patches.

    Attributes:
        rows: patches down.
        columns: patches across.
        batch: images in the step.
        shapes: share of easy-VQA images.
        max_signs: most signs in one window.
    """

    rows: int
    columns: int
    batch: int
    shapes: float
    max_signs: int


READING = Window(5, 9, 128, 0.0, 1)
SMALL = Window(8, 8, 96, 0.65, 1)
MEDIUM = Window(12, 12, 48, 0.45, 2)
LARGE = Window(16, 16, 24, 0.4, 3)
FULL = Window(24, 24, 12, 0.35, 3)

# (until which share of the stage, windows to choose from with their weights): small windows teach most per
# second, but a tower that saw only them loses half of the digits in the full image.
CURRICULUM: tuple[tuple[float, dict[Window, float]], ...] = (
    (0.35, {READING: 0.75, SMALL: 0.25}),
    (0.6, {READING: 0.25, SMALL: 0.1, MEDIUM: 0.5, LARGE: 0.15}),
    (1.0, {READING: 0.15, MEDIUM: 0.3, LARGE: 0.3, FULL: 0.25}),
)


def choose_window(rng: random.Random, progress: float) -> Window:
    """The window of the next step, by how much of the stage is done (0 to 1)."""
    for until, choices in CURRICULUM:
        if progress < until or until == 1.0:
            return rng.choices(list(choices), list(choices.values()))[0]
    raise AssertionError("the curriculum ends at 1.0")


def random_positions(rng: random.Random, batch: int, rows: int, columns: int) -> Tensor:
    """For each image, the grid indices of a window at a random place, (batch, rows * columns) int64."""
    grid = ARCHITECTURE.grid
    inside = (torch.arange(rows)[:, None] * grid + torch.arange(columns)).reshape(1, -1)
    corner = [rng.randint(0, grid - rows) * grid + rng.randint(0, grid - columns) for _ in range(batch)]
    return inside + torch.tensor(corner)[:, None]


def image_flags(scene: Scene) -> NDArray[np.float32]:
    """What [CLS] should know: colours, kinds, digits with their places, (NUM_FLAGS,)."""
    flags = np.zeros(NUM_FLAGS, np.float32)
    offset_kind, offset_digit = len(COLOUR_NAMES), len(COLOUR_NAMES) + len(KINDS)
    if scene.shape is not None:
        flags[scene.shape.colour] = flags[offset_kind + 1 + scene.shape.shape] = 1
    for sign in scene.signs:
        flags[sign.colour] = flags[offset_kind] = 1
        for place, digit in enumerate(sign.number):
            flags[offset_digit + 10 * place + int(digit)] = 1
    return flags


def draw(rng: random.Random, shapes: EasyVqa, window: Window) -> Scene:
    """One training image of the size of the window."""
    if rng.random() < window.shapes:
        return shapes.scene(rng.choice(shapes.indices), rng, window.rows * P)
    count = rng.randint(1, window.max_signs)
    return render_signs(rng, window.rows * P, window.columns * P, TRAINING_NUMBERS, count)


def patch_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the four patch labels, background weighted down.

    Args:
        logits: (B, N, sum of NUM_CLASSES), fp32.
        labels: (B, 4, N), int64.

    Returns:
        The loss, and the share of foreground patches read right for each label, (4,).
    """
    total, shares = logits.new_zeros(()), []
    for index, part in enumerate(logits.split(NUM_CLASSES, dim=-1)):
        target = labels[:, index]
        weight = torch.ones(part.shape[-1])
        weight[0] = BACKGROUND_WEIGHT
        total = total + F.cross_entropy(part.flatten(0, 1), target.flatten(), weight)
        right = (part.argmax(-1) == target)[target > 0].float()
        shares.append(right.mean() if len(right) else torch.tensor(float("nan")))
    return total, torch.stack(shares)


def train_vision(work: Path, seconds: float, seed: int = 1) -> None:
    """Train the tower for a given time and leave `vision.pt` in the work folder.

    Args:
        work: folder of checkpoints; a `vision.pt` that is there is continued.
        seconds: time for this stage.
        seed: for weights, images and windows.
    """
    torch.manual_seed(seed)
    shapes = EasyVqa("train")
    tower = VisionTower()
    heads = VisionHeads(ARCHITECTURE, sum(NUM_CLASSES), NUM_FLAGS)
    muon = Muon(tower.matrices(), lr=0.02)
    inside = {id(param) for group in tower.matrices() for param in group.params}
    others = [param for module in (tower, heads) for param in module.parameters() if id(param) not in inside]
    adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    peak = {"muon": 0.02, "adam": 2e-3}
    spent, step = 0.0, 0
    path = work / "vision.pt"
    if path.exists():
        saved = torch.load(path)
        tower.load_state_dict(saved["tower"])
        heads.load_state_dict(saved["heads"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        spent, step = saved["spent"], saved["step"]
    rng = random.Random(seed + step)
    running: dict[str, float] = {}
    images, begin = 0, time.monotonic() - spent
    with tqdm(total=round(seconds), initial=round(spent), unit="s", desc="vision") as bar:
        while (spent := time.monotonic() - begin) < seconds:
            progress = spent / seconds
            scale = min(1.0, (step + 1) / 60, max(0.02, (1 - progress) / 0.45))
            for group in muon.param_groups:
                group["lr"] = peak["muon"] * scale
            for group in adam.param_groups:
                group["lr"] = peak["adam"] * scale
            window = choose_window(rng, progress)
            scenes = [draw(rng, shapes, window) for _ in range(window.batch)]
            patches = to_patches([scene.image for scene in scenes])
            position = random_positions(rng, window.batch, window.rows, window.columns)
            labels = torch.from_numpy(np.stack([scene.labels for scene in scenes])).flatten(2).long()
            flags = torch.from_numpy(np.stack([image_flags(scene) for scene in scenes]))
            patch_logits, cls_logits = heads(tower(patches, position), tower)
            early, _ = patch_loss(patch_logits[0], labels)
            late, shares = patch_loss(patch_logits[1], labels)
            read = [F.binary_cross_entropy_with_logits(logits, flags) for logits in cls_logits]
            loss = late + 0.3 * early + 3 * read[-1] + sum(read[:-1])
            muon.zero_grad()
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(others, 1.0)
            muon.step()
            adam.step()
            step += 1
            images += window.batch
            name = f"{window.rows}x{window.columns}"
            values = {f"{name} {label}": float(share) for label, share in zip("dpck", shares, strict=True)}
            values |= {f"{name} cls{index}": value.item() for index, value in enumerate(read)}
            for key, value in values.items():
                if value == value:  # a window without signs has no digits to read
                    running[key] = 0.95 * running.get(key, value) + 0.05 * value
            if step % 50 == 0:
                bar.update(round(spent) - bar.n)
                bar.write(
                    f"vision {step} {images / (time.monotonic() - begin):.0f} images/s "
                    + " ".join(f"{key}={value:.3f}" for key, value in sorted(running.items()))
                )
            if step % 400 == 0:
                save(path, tower, heads, muon, adam, spent, step)
    save(path, tower, heads, muon, adam, seconds, step)


def save(path, tower, heads, muon, adam, spent, step) -> None:
    torch.save(
        {
            "tower": tower.state_dict(),
            "heads": heads.state_dict(),
            "muon": muon.state_dict(),
            "adam": adam.state_dict(),
            "spent": spent,
            "step": step,
        },
        path,
    )
