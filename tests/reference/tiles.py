"""LLaVA-NeXT's tiles, each reduced alone and then put together, written plainly: part of the oracles."""

from fractions import Fraction

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution

from tests.reference.algorithm1 import ReferenceLlava, Shown
from tests.reference.algorithm2 import ReferenceDecoder
from tests.reference.dense_tower import DenseLlava


class Tiled(ReferenceLlava):
    """Mixin for an oracle whose tower sees an image whole; the first base class."""

    model_class = LlavaNextForConditionalGeneration
    per_image = False

    def shown(self, image: Image.Image) -> list[list[Shown]]:
        """Part of each tile that shows the image, row by row of tiles."""
        config, side = self.config, self.side
        height, width = select_best_resolution((image.height, image.width), config.image_grid_pinpoints)
        rows, columns = (pixels // config.vision_config.image_size for pixels in (height, width))
        lines, places = range(rows * side), range(columns * side)
        if image.width / image.height > columns / rows:
            used = int(round(image.height * (columns * side / image.width), 7))
            lines = lines[(rows * side - used) // 2 :][: rows * side - (rows * side - used) // 2 * 2]
        else:
            used = int(round(image.width * (rows * side / image.height), 7))
            places = places[(columns * side - used) // 2 :][
                : columns * side - (columns * side - used) // 2 * 2
            ]
        return [
            [
                Shown(
                    range(max(lines.start - row * side, 0), max(0, min(lines.stop - row * side, side))),
                    range(
                        max(places.start - column * side, 0), max(0, min(places.stop - column * side, side))
                    ),
                )
                for column in range(columns)
            ]
            for row in range(rows)
        ]

    @torch.no_grad()
    def features(self, image: Image.Image, keep: int) -> Tensor:
        """Projected visual tokens of one image and newlines, in the order in which the decoder sees them."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0].double()
        whole = Shown(range(self.side), range(self.side))
        tiles = [whole, *(shown for row in self.shown(image) for shown in row)]
        keeps = self._keeps(keep, [len(shown.places) for shown in tiles])
        if keeps == [len(shown.places) for shown in tiles]:
            return self._unreduced(pixels, image)
        pieces = [tokens for _, _, tokens in self._tile(pixels[0], keeps[0], whole)]
        number = 0
        for row in self.shown(image):
            result = []
            for column, shown in enumerate(row):
                number += 1
                for line, place, token in self._tile(pixels[number], keeps[number], shown):
                    result.append((line, column * self.side + place if line < self.side else 0, token))
            pieces += [token for *_, token in sorted(result, key=lambda item: item[:2])]
            pieces += [self.model.model.image_newline] * bool(result)
        return torch.stack(pieces)

    def _keeps(self, keep: int, sizes: list[int]) -> list[int]:
        if not self.per_image:
            return [min(keep, size) for size in sizes]
        exact = [Fraction(min(keep, sum(sizes)) * size, sum(sizes)) for size in sizes]
        keeps = [int(share) for share in exact]
        while sum(keeps) < min(keep, sum(sizes)):
            best = max(range(len(sizes)), key=lambda index: exact[index] - keeps[index])
            keeps[best] += 1
        return keeps

    def _tile(self, pixels: Tensor, keep: int, shown: Shown) -> list[tuple[int, int, Tensor]]:
        """Line, place in it and projected token of each kept one; fused ones have the line after the last."""
        if not keep:
            return []
        hidden, position = self.encode(pixels[None], keep, shown)
        projected = self.model.model.multi_modal_projector(hidden[0, 1:])
        places = [shown.places[index] if index >= 0 else (self.side, 0) for index in position]
        return [(*place, token) for place, token in zip(places, projected, strict=True)]

    def _unreduced(self, pixels: Tensor, image: Image.Image) -> Tensor:
        """As Hugging Face does it."""
        size = torch.tensor([[image.height, image.width]])
        model = self.model.model
        result = model.get_image_features(pixel_values=pixels[None], image_sizes=size)
        features: Tensor = torch.cat(list(getattr(result, "pooler_output", result)))
        return features


class TiledLlava(Tiled):
    """FiCoCo-V on LLaVA-NeXT."""


class TiledDense(Tiled, DenseLlava):
    """Any method of the tower on LLaVA-NeXT."""


class TiledDecoder(Tiled, ReferenceDecoder):
    """Methods of the decoder on LLaVA-NeXT."""
