"""The frozen tower's patch features of many images, kept in memory and on disk for the decoder's training."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ficoco_vllm.benchmarks.questions.scene import DIGIT, KIND, Scene, Shape, Sign
from ficoco_vllm.benchmarks.questions.shapes import EasyVqa
from ficoco_vllm.benchmarks.questions.signs import TRAINING_NUMBERS, render_signs
from tools.demo_model.architecture import ARCHITECTURE
from tools.demo_model.pixels import to_patches
from tools.demo_model.vision import VisionTower

ENCODE_BATCH = 16
# hidden_states[-2], LLaVA's feature layer: the output of the last layer but one.
FEATURE_DEPTH = ARCHITECTURE.vision_layers - 1


@dataclass
class Features:
    """Features of n images.

    Attributes:
        patches: (n, 576, D), bf16.
        labels: (n, 4, 576), int8.
        shown: signs or shape of each image.
    """

    patches: Tensor
    labels: Tensor
    shown: list[tuple[Sign, ...] | Shape]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.shown)


@torch.no_grad()
def encode(tower: VisionTower, scenes: list[Scene], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Patch features as the decoder gets them, (B, 576, D), in a given type."""
    patches = to_patches([scene.image for scene in scenes], dtype)
    position = torch.arange(ARCHITECTURE.num_patches).expand(len(scenes), -1)
    return tower(patches, position, FEATURE_DEPTH)[-1][:, 1:]


def training_scene(rng: random.Random, shapes: EasyVqa, shape_share: float) -> Scene:
    """A full-size training image: an easy-VQA shape, or one to three signs, with higher counts more frequent."""
    if rng.random() < shape_share:
        return shapes.scene(rng.choice(shapes.indices), rng)
    side = ARCHITECTURE.image_size
    return render_signs(rng, side, side, TRAINING_NUMBERS, rng.choice((1, 2, 2, 3, 3)))


def collect(tower: VisionTower, num_images: int, shape_share: float, seed: int) -> Features:
    """Render and encode training images.

    Args:
        tower: the frozen tower.
        num_images: number of images.
        shape_share: share of easy-VQA images.
        seed: for the images.
    """
    rng, shapes = random.Random(seed), EasyVqa("train")
    patches, labels, shown = [], [], []
    for _ in tqdm(range(0, num_images, ENCODE_BATCH), unit="batch", desc="features", mininterval=10):
        scenes = [training_scene(rng, shapes, shape_share) for _ in range(ENCODE_BATCH)]
        patches.append(encode(tower, scenes))
        labels.append(torch.from_numpy(np.stack([scene.labels for scene in scenes])).flatten(2))
        shown += [scene.shape or scene.signs for scene in scenes]
    return Features(torch.cat(patches), torch.cat(labels), shown)


def load_or_collect(
    path: Path, tower: VisionTower, num_images: int, shape_share: float, seed: int
) -> Features:
    """Features from a file, which is created if missing."""
    if not path.exists():
        made = collect(tower, num_images, shape_share, seed)
        torch.save({"patches": made.patches, "labels": made.labels, "shown": made.shown}, path)
    saved = torch.load(path, weights_only=False)
    return Features(saved["patches"], saved["labels"], saved["shown"])


def choose_tokens(labels: Tensor, num_tokens: int) -> Tensor:
    """A random subset of patches that includes all digits if there is room.

    Args:
        labels: (B, 4, 576), int8.
        num_tokens: number to keep.

    Returns:
        Kept indices in raster order, (B, num_tokens), int64.
    """
    if num_tokens >= labels.shape[-1]:
        return torch.arange(labels.shape[-1]).expand(len(labels), -1)
    order = (
        torch.rand(len(labels), labels.shape[-1])
        + (labels[:, KIND] > 0).float()
        + (labels[:, DIGIT] > 0).float()
    )
    return order.topk(num_tokens, dim=1).indices.sort(dim=1).values
