"""Tiles and token counts of LLaVA-NeXT's images, compared with vLLM's own count and with counts by hand."""

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from vllm.model_executor.models.llava_next import LlavaNextProcessingInfo

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.families import tower_shape
from ficoco_vllm.planning.tiles import shared_out
from ficoco_vllm.planning.tiling import AnyRes, Crop, best_resolution, unpadded
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.vision.packing import Kept, pack

pytestmark = pytest.mark.compat

SIZES = [
    *(
        (height, width)
        for height in (1, 37, 336, 337, 480, 672, 1500)
        for width in (1, 50, 336, 500, 672, 1008)
    ),
    *((672, 2000), (10, 4000), (4000, 10), (333, 1011), (1008, 336), (672, 673)),
]


def config(**changes: Any) -> LlavaNextConfig:
    """LLaVA-NeXT-7B's, as far as tiles and tower are concerned."""
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            image_size=336, patch_size=14, num_hidden_layers=24, num_attention_heads=16
        ),
        text_config=LlamaConfig(),
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        vision_feature_layer=-2,
        **({"vision_feature_select_strategy": "default"} | changes),
    )


class StockInfo(LlavaNextProcessingInfo):
    """vLLM's own processing info, without an engine."""

    def __init__(self) -> None:
        pass

    def get_hf_config(self) -> Any:
        """Configuration of the model."""
        return config()


def planner(**settings: Any) -> VisionPlanner:
    """LLaVA-NeXT-7B's tower."""
    return VisionPlanner.shared(FicocoConfig.parse(settings), tower_shape(config()))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_counts(height: int, width: int) -> None:
    """Without reduction vLLM's count; with it the kept tokens of each tile, and a newline for each row of tiles."""
    stock = StockInfo().get_num_image_tokens(image_height=height, image_width=width)
    served = planner()
    assert served.num_image_tokens(served.default, height=height, width=width) == stock
    served = planner(method="ficoco-v", keep=64)
    result = served.layout(served.default, height, width)
    assert result.num_before == stock
    assert result.tiles[0].place.crop == Crop(0, 0, 24, 24)
    assert [tile.keep for tile in result.tiles] == [
        min(64, tile.place.crop.num_units) for tile in result.tiles
    ]
    assert result.num_tokens == sum(tile.keep for tile in result.tiles) + len(result.newline_rows)
    # Every patch that stock vLLM hands on is in exactly one tile.
    places = served.shape.tiling.places(height, width)
    lines = sum(place.crop.rows for place in places if place.column == 0)
    assert sum(place.crop.num_units for place in places) + lines == stock


@pytest.mark.parametrize("step", [7, 11, 13, 17])
def test_the_grid_and_the_crop_are_those_of_transformers(step: int) -> None:
    """Sizes from lines of a pixel to 4,000 x 4,000."""
    pinpoints = config().image_grid_pinpoints
    lengths = [1, 2, 3, *range(4, 336, step), *range(336, 4000, 12 * step)]
    for height in lengths:
        for width in lengths:
            rows, columns = get_anyres_image_grid_shape((height, width), pinpoints, 336)
            best = best_resolution(height, width, tuple(map(tuple, pinpoints)))
            assert best == (rows * 336, columns * 336), (height, width)
            canvas = torch.empty((1, rows * 24, columns * 24), device="meta")
            shown = tuple(unpad_image(canvas, (height, width)).shape[1:])
            assert unpadded(height, width, rows * 24, columns * 24) == shown, (height, width)


def test_the_crop_of_a_wide_image() -> None:
    """2000 x 300 is laid into 1008 x 336: of 24 rows of patches the middle 10 show it."""
    result = planner(keep=64).layout(Budget("ficoco-v", 64), 300, 2000)
    assert [tile.place.crop for tile in result.tiles[1:]] == [Crop(7, 0, 10, 24)] * 3
    assert result.num_tokens == 4 * 64 + 1


@pytest.mark.parametrize(("height", "width", "before"), [(1, 4000, 576), (4000, 1, 576 + 24)])
def test_a_line_of_pixels_has_a_base_view_only(height: int, width: int, before: int) -> None:
    """Scaled, it is thinner than a patch: stock vLLM crops a wide line, and keeps only the newlines of a tall one."""
    result = planner(keep=64).layout(Budget("ficoco-v", 64), height, width)
    assert (result.num_tokens, result.num_before, result.newline_rows) == (64, before, ())


def test_a_tile_with_fewer_patches_than_its_budget_keeps_them() -> None:
    result = planner(keep=300).layout(Budget("ficoco-v", 300), 300, 2000)
    assert [tile.keep for tile in result.tiles] == [300, 240, 240, 240]


@pytest.mark.parametrize("keep", [1, 3, 100, 1295, 1296, 1297, 2880])
def test_a_budget_of_an_image(keep: int) -> None:
    """The image of 300 x 2000 has 576 + 3 x 240 patches; keeping all is stock vLLM's layout, with its newlines."""
    served = planner(method="ficoco-v", keep=320, keep_per="image")
    result = served.layout(Budget("ficoco-v", keep), 300, 2000)
    if keep >= 1296:
        assert (result.reduces, result.num_tokens) == (False, 1296 + 10)
        return
    assert sum(tile.keep for tile in result.tiles) == keep
    assert result.num_tokens == keep + (len(result.tiles) > 1)
    assert served.default.keep == 320
    assert planner(method="ficoco-v", keep_per="image").default.keep == 320  # a ninth of 2880


def test_shares() -> None:
    assert shared_out(5, [576, 576, 240]) == [2, 2, 1]
    assert shared_out(1, [576, 576]) == [1, 0]
    assert shared_out(7, [3, 4]) == [3, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 577}, r"ficoco.keep = 577 is not allowed; allowed: an integer from 1 to 576"),
        ({"keep": 2881, "keep_per": "image"}, r"allowed: an integer from 1 to 2880"),
        ({"keep": 564, "schedule": [1] * 12}, r"ficoco.schedule = \[1, .*not allowed with images in tiles"),
        ({"method": "ficoco-vl", "encoder": {"keep_per": "image"}}, r"ficoco.encoder.keep_per = 'image'"),
        ({"method": "ficoco-l", "keep_per": "image"}, r"keep_per = 'image' is for the tower"),
        ({"keep": 64, "keep_per": "row"}, r"ficoco.keep_per = 'row' is not allowed"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planner(**settings)


def test_models_that_cannot_be_reduced() -> None:
    with pytest.raises(ValueError, match="vision_feature_select_strategy = 'full'"):
        tower_shape(config(vision_feature_select_strategy="full"))


def test_packing() -> None:
    """Two rows of two tiles of 2 x 2 patches: line by line across the tiles, a fused token last, then the newline."""
    small = TowerShape((2, 2), 24, 23, False, AnyRes(((4, 4),), 2, 2))
    planner = VisionPlanner.shared(FicocoConfig(method="topk-cls", keep=2), small)
    result = planner.layout(Budget("topk-cls", 2), 4, 4)
    positions = [[0, 1], [1, 2], [0, -1], [0, 3], [2, 3]]
    kept = [
        Kept(torch.tensor([[10.0 * tile + place] for place in places]), torch.tensor(places))
        for tile, places in enumerate(positions)
    ]
    packed = pack(result, kept, torch.tensor([99.0]), 2)
    assert packed[:, 0].tolist() == [0, 1, 11, 20, 12, 19, 99, 30, 33, 42, 43, 99]
