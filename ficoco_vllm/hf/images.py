"""Tokens of images as they enter the language model, reduced by the tower's method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ficoco_vllm.hf.tower import HfTower
from ficoco_vllm.planning.tiles import Layout
from ficoco_vllm.planning.tiling import Crop, Place
from ficoco_vllm.planning.tower import VisionPlan, VisionPlanner
from ficoco_vllm.vision.packing import Kept, pack
from ficoco_vllm.vision.relevance import Relevance
from ficoco_vllm.vision.tiles import keep_tiles
from ficoco_vllm.vision.tower import Tokens, encode

NO_PATCH = -1


@dataclass(frozen=True)
class ImageTokens:
    """One image. Its length is that of the unreduced image, which `generate` compares with the placeholders.

    Attributes:
        tokens: (n, D) projected.
        patch: (n,) int64 patch that each token represents: index in the grid, for LLaVA-NeXT tile by tile with the base
            view first; `NO_PATCH` for a fused token, [CLS] and a newline.
        num_placeholders: tokens that the processor wrote into the prompt.
    """

    tokens: Tensor
    patch: Tensor
    num_placeholders: int

    def __len__(self) -> int:
        return self.num_placeholders


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images as the processor returns them, and the sizes of LLaVA-NeXT's."""

    values: Tensor
    sizes: Tensor | None


@dataclass(frozen=True, eq=False)
class PostponedImage:
    """One image that is encoded once its question is known, with those that came with it.

    Attributes:
        pixels: pixels of the whole batch.
        num_placeholders: tokens that the processor wrote into the prompt.
    """

    pixels: Pixels
    num_placeholders: int

    def __len__(self) -> int:
        return self.num_placeholders


class ImageEncoder:
    """Tower and projector of one model under one plan."""

    def __init__(self, model: Any, planner: VisionPlanner, stock: Callable[..., Any]) -> None:
        """Share the modules of a model.

        Args:
            model: transformers' `LlavaModel` or `LlavaNextModel`.
            planner: planner of its tower.
            stock: the model's own `get_image_features`, for images that are not reduced.
        """
        self.model, self.planner, self.stock = model, planner, stock
        self.tower = HfTower(model.vision_tower, planner.shape.num_executed_layers)

    @property
    def reads_question(self) -> bool:
        """Whether what stays of an image depends on the question about it."""
        return self.planner.reads_question(self.planner.default.method)

    def __call__(
        self, pixels: Tensor, sizes: Tensor | None, questions: Sequence[Tensor] = ()
    ) -> list[ImageTokens]:
        """Encode images.

        Args:
            pixels: as the processor returns them.
            sizes: (n, 2) height and width of each image, for LLaVA-NeXT.
            questions: tokens (M,) int64 of the question about each image, where the method reads it.
        """
        if self.planner.shape.tiling is None:
            return self._whole_images(pixels, questions)
        return self._tiled_images(pixels, _checked(sizes), questions)

    def postpone(self, pixels: Tensor, sizes: Tensor | None) -> list[PostponedImage]:
        """Images whose questions are not known yet; see `__call__`."""
        planner, shape = self.planner, self.planner.shape
        given = Pixels(pixels, sizes)
        if shape.tiling is None:
            return [PostponedImage(given, shape.num_units + shape.with_cls) for _ in pixels]
        layouts = [planner.layout(planner.default, *size) for size in _checked(sizes)]
        return [PostponedImage(given, layout.num_before) for layout in layouts]

    def encode_postponed(
        self, images: Sequence[PostponedImage], questions: Sequence[Tensor]
    ) -> list[ImageTokens]:
        """Encode images whose questions are known.

        Args:
            images: whole batches of `postpone`, each once or several times over, as for beams.
            questions: tokens (M,) int64 of the question about each of them.
        """
        batches: dict[Pixels, dict[PostponedImage, Tensor]] = {}
        for image, question in zip(images, questions, strict=True):
            batches.setdefault(image.pixels, {}).setdefault(image, question)
        encoded: dict[PostponedImage, ImageTokens] = {}
        for pixels, batch in batches.items():
            tokens = self(pixels.values, pixels.sizes, list(batch.values()))
            encoded |= dict(zip(batch, tokens, strict=True))
        return [encoded[image] for image in images]

    def read(self, tokens: Tensor) -> Tensor:
        """Embeddings of a question; see `Source`."""
        embeddings: Tensor = self.model.get_input_embeddings()(tokens)
        return embeddings

    def show(self, units: Tensor) -> Tensor:
        """Embeddings of units, as the language model reads them; see `Source`."""
        projected: Tensor = self.model.multi_modal_projector(units)
        return projected

    def _relevance(self, questions: Sequence[Tensor]) -> Relevance | None:
        return Relevance(self, questions) if self.reads_question else None

    def _whole_images(self, pixels: Tensor, questions: Sequence[Tensor]) -> list[ImageTokens]:
        shape, budget = self.planner.shape, self.planner.default
        num_placeholders = shape.num_units + shape.with_cls
        if self.planner.active and self.planner.reduces(budget):
            plan, relevance = self.planner.plan(budget), self._relevance(questions)
            kept = encode(self.tower, pixels, plan, shape.grid, relevance=relevance)
            features = self.model.multi_modal_projector(kept.hidden[:, 0 if shape.with_cls else 1 :])
            patch = kept.position
        else:
            features = self.stock(pixel_values=pixels, return_dict=True).pooler_output
            patch = torch.arange(shape.num_units, device=pixels.device).expand(len(pixels), -1)
        if shape.with_cls:
            patch = torch.cat([torch.full_like(patch[:, :1], NO_PATCH), patch], dim=1)
        return [ImageTokens(*one, num_placeholders) for one in zip(features, patch, strict=True)]

    def _tiled_images(
        self, pixels: Tensor, sizes: Sequence[tuple[int, int]], questions: Sequence[Tensor]
    ) -> list[ImageTokens]:
        planner, budget = self.planner, self.planner.default
        assert planner.shape.tiling is not None
        places = [planner.shape.tiling.places(*size) for size in sizes]
        counts = [len(of_image) for of_image in places]
        if pixels.dim() == 5:
            tiles = [image[:count] for image, count in zip(pixels, counts, strict=True)]
        else:
            tiles = list(torch.split(pixels, counts))
        layouts = [planner.layout(budget, *size) for size in sizes]
        result: dict[int, ImageTokens] = {}
        whole = [index for index, layout in enumerate(layouts) if not layout.reduces]
        if whole:
            stock = self.stock(
                pixel_values=torch.cat([tiles[index] for index in whole]),
                image_sizes=torch.tensor([sizes[index] for index in whole], device=pixels.device),
                return_dict=True,
            )
            for index, tokens in zip(whole, stock.pooler_output, strict=True):
                patch = _unreduced_patches(places[index], planner.shape.grid[0]).to(tokens.device)
                result[index] = ImageTokens(tokens, patch, layouts[index].num_before)

        def run(
            batch: Tensor,
            plan: VisionPlan,
            grid: tuple[int, int],
            crop: Crop | None,
            of_images: Sequence[tuple[int, int]],
        ) -> Tokens:
            about = [questions[image] for image, _ in of_images] if questions else []
            return encode(self.tower, batch, plan, grid, crop=crop, relevance=self._relevance(about))

        kept = keep_tiles(
            tiles,
            layouts,
            [budget] * len(layouts),
            planner,
            most=sum(counts),
            whole=lambda batch, _: self.tower.features(batch),
            encode=run,
            project=self.model.multi_modal_projector,
        )
        for index, of_tiles in kept.items():
            result[index] = self._packed(layouts[index], of_tiles)
        return [result[index] for index in range(len(layouts))]

    def _packed(self, layout: Layout, kept: Sequence[Kept]) -> ImageTokens:
        """One image from its tiles; the patches are put in order by the function that orders the tokens."""
        side = self.planner.shape.grid[0]
        newline = self.model.image_newline.to(kept[0].tokens)
        patches = []
        for tile, (_, position) in zip(layout.tiles, kept, strict=True):
            named = _patch(
                tile.place, side, position // tile.place.crop.columns, position % tile.place.crop.columns
            )
            patches.append(Kept(torch.where(position < 0, NO_PATCH, named)[:, None], position))
        no_patch = torch.full((1,), NO_PATCH, device=newline.device)
        patch = pack(layout, patches, no_patch, side)[:, 0]
        return ImageTokens(pack(layout, kept, newline, side), patch, layout.num_before)


def _checked(sizes: Tensor | None) -> list[tuple[int, int]]:
    """Height and width of each image."""
    if sizes is None:
        raise ValueError("image_sizes = None is not allowed; LLaVA-NeXT needs height and width of each image")
    return [(int(height), int(width)) for height, width in sizes.tolist()]


def _patch(place: Place, side: int, row: Tensor, column: Tensor) -> Tensor:
    """Number of a patch at a row and a column of a tile's crop."""
    return place.number * side * side + (place.crop.top + row) * side + place.crop.left + column


def _unreduced_patches(places: Sequence[Place], side: int) -> Tensor:
    """Patches of an unreduced image, in the order of its tokens: base view, then lines that end in a newline."""
    patches = [torch.arange(side * side)]
    for _, row in groupby(places[1:], key=lambda place: place.row):
        tiles = list(row)
        for line in range(tiles[0].crop.rows):
            patches += [
                _patch(tile, side, torch.tensor(line), torch.arange(tile.crop.columns)) for tile in tiles
            ]
            patches.append(torch.tensor([NO_PATCH]))
    return torch.cat(patches)
