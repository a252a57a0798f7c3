"""Token counts of InternVL: an image in tiles and a thumbnail, 2 x 2 patches of which become one token."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ficoco_vllm.planning.tiling import WHOLE, Box, Crop, Place, Tiling
from ficoco_vllm.planning.tower_shape import TowerShape, image_settings

# Rows and columns of patches that become one token: the pixel shuffle of `downsample_ratio` = 0.5.
SIDE_OF_UNIT = 2


@dataclass(frozen=True)
class Mosaic(Tiling):
    """The tiles of InternVL: the image is stretched over a grid of tiles of nearly its ratio. Then comes a thumbnail.

    Attributes:
        fewest: tiles of the smallest grid.
        most: tiles of the largest grid, without the thumbnail.
        tile_size: height and width of a tile in pixels.
        side: height and width of a tile in units.
        thumbnail: whether a thumbnail follows several tiles.
    """

    fewest: int
    most: int
    tile_size: int
    side: int
    thumbnail: bool = True

    @property
    def most_tiles(self) -> int:
        """Tiles of the largest image, including its thumbnail."""
        return self.most + (self.thumbnail and self.most > 1)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """See `Tiling`."""
        grids = _grids(self.fewest, self.most)
        return tuple((rows * self.tile_size, columns * self.tile_size) for columns, rows in grids)

    def places(self, height: int, width: int) -> tuple[Place, ...]:
        """See `Tiling`; the thumbnail comes last, where there are several tiles."""
        return _places(self, *self._grid(height, width))

    def places_of(self, num_tiles: int) -> tuple[Place, ...]:
        """The tiles of an image of which only their number is known, as if in one row.

        Args:
            num_tiles: including the thumbnail.
        """
        return _places(self, max(1, num_tiles - self.thumbnail), 1)

    def box(self, place: Place, height: int, width: int) -> Box:
        """See `Tiling`."""
        if place.row < 0:
            return WHOLE
        columns, rows = self._grid(height, width)
        return place.column / columns, place.row / rows, 1 / columns, 1 / rows

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Columns and rows of tiles.

        Source: transformers, `get_optimal_tiled_canvas`, whose floating-point arithmetic this repeats.
        """
        ratio, area = width / height, width * height
        best, smallest = (1, 1), float("inf")
        for columns, rows in _grids(self.fewest, self.most):
            difference = abs(ratio - columns / rows)
            large = area > 0.5 * self.tile_size * self.tile_size * columns * rows
            if difference < smallest or (difference == smallest and large):
                best, smallest = (columns, rows), difference
        return best


@lru_cache(maxsize=64)
def _grids(fewest: int, most: int) -> tuple[tuple[int, int], ...]:
    """Columns and rows of all grids, from few tiles to many."""
    sides = range(1, most + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if fewest <= columns * rows <= most]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


@lru_cache(maxsize=1024)
def _places(tiling: Mosaic, columns: int, rows: int) -> tuple[Place, ...]:
    whole = Crop(0, 0, tiling.side, tiling.side)
    tiles = [divmod(number, columns) for number in range(columns * rows)]
    places = [Place(number, row, column, whole) for number, (row, column) in enumerate(tiles)]
    if len(places) == 1:
        return (Place(0, -1, -1, whole),)
    return (*places, Place(len(places), -1, -1, whole)) if tiling.thumbnail else tuple(places)


def settings(processor: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the image processor that decide how many tiles an image has.

    Args:
        processor: transformers' image processor, or an object with the fields of its preprocessor_config.json.
        overrides: `mm_processor_kwargs`.
    """
    named = {**overrides, **(overrides.get("images_kwargs") or {})}
    # InternVLProcessor cuts images unless that is disabled, whatever the image processor's own setting.
    return {
        "crop_to_patches": bool(named.get("crop_to_patches", True)),
        "min_patches": int(named.get("min_patches", processor.min_patches)),
        "max_patches": int(named.get("max_patches", processor.max_patches)),
    }


def chat_settings(hf_config: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of OpenGVLab's own format that decide how many tiles an image has.

    Args:
        hf_config: the checkpoint's InternVLChatConfig, or an object with its fields.
        overrides: `mm_processor_kwargs`.
    """
    names = ("min_dynamic_patch", "max_dynamic_patch", "dynamic_image_size", "use_thumbnail")
    own = {name: getattr(hf_config, name) for name in names}
    own["image_size"] = hf_config.vision_config.image_size
    return {name: overrides.get(name, value) for name, value in own.items()}


def shape(hf_config: Any) -> TowerShape:
    """Read an InternVL configuration in Hugging Face's format.

    Args:
        hf_config: transformers' InternVLConfig, with the settings of the image processor.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    vision, images = hf_config.vision_config, image_settings(hf_config)
    _check(
        {
            "vision_config.model_type": (vision.model_type, "internvl_vision"),
            "vision_feature_layer": (hf_config.vision_feature_layer, -1),
            "vision_feature_select_strategy": (hf_config.vision_feature_select_strategy, "default"),
            "downsample_ratio": (hf_config.downsample_ratio, 1 / SIDE_OF_UNIT),
        }
    )
    (height, width), (patch, _) = vision.image_size, vision.patch_size
    side = _side(height, width, patch)
    most = images["max_patches"] if images["crop_to_patches"] else 1
    fewest = images["min_patches"] if images["crop_to_patches"] else 1
    if not 1 <= fewest <= most:
        raise ValueError(
            f"ficoco: min_patches = {fewest} is not allowed; allowed: an integer from 1 to {most}"
        )
    return _tower(vision.num_hidden_layers, Mosaic(fewest, most, height, side))


def chat_shape(hf_config: Any) -> TowerShape:
    """Read an InternVL configuration in OpenGVLab's own format.

    Args:
        hf_config: the checkpoint's InternVLChatConfig, with the settings of its images.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    vision, images = hf_config.vision_config, image_settings(hf_config)
    _check(
        {
            "select_layer": (hf_config.select_layer, -1),
            "ps_version": (hf_config.ps_version, "v2"),  # the first version transposes the units
            "downsample_ratio": (hf_config.downsample_ratio, 1 / SIDE_OF_UNIT),
            "image_size": (images["image_size"], vision.image_size),
            # Among grids of as many tiles, vLLM's choice would follow the order of a set.
            "min_dynamic_patch": (images["min_dynamic_patch"], 1),
        }
    )
    side = _side(vision.image_size, vision.image_size, vision.patch_size)
    most = images["max_dynamic_patch"] if images["dynamic_image_size"] else 1
    if not isinstance(most, int) or most < 1:
        raise ValueError(
            f"ficoco: max_dynamic_patch = {most!r} is not allowed; allowed: an integer of at least 1"
        )
    tiling = Mosaic(1, most, vision.image_size, side, thumbnail=bool(images["use_thumbnail"]))
    return _tower(vision.num_hidden_layers, tiling)


def _check(allowed: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse the first field whose value (first of the pair) differs from the allowed value (second)."""
    for name, (value, expected) in allowed.items():
        if value != expected:
            raise ValueError(f"ficoco: {name} = {value!r} cannot be reduced; allowed: {expected!r}")


def _side(height: int, width: int, patch: int) -> int:
    """Height and width of a tile in units."""
    if height != width or height // patch % SIDE_OF_UNIT:
        raise ValueError(
            f"ficoco: vision_config.image_size = {height, width} cannot be reduced; allowed: a square of an even "
            f"number of patches of {patch} pixels"
        )
    return height // patch // SIDE_OF_UNIT


def _tower(num_layers: int, tiling: Mosaic) -> TowerShape:
    return TowerShape(
        grid=(tiling.side, tiling.side),
        num_layers=num_layers,
        num_executed_layers=num_layers,
        with_cls=False,
        tiling=tiling,
        unit=SIDE_OF_UNIT**2,
    )
