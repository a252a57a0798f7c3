"""InternVL's tiles and their boxes against the image processors of both formats, and budgets of an image."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GotOcr2ImageProcessor, InternVLConfig

from ficoco_vllm.compat.versions import internvl_chat_processors
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.families import FAMILIES, internvl, leave_image_settings, tower_shape
from ficoco_vllm.planning.families.internvl import Mosaic
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import IMAGES

# Height and width.
SIZES = [
    (448, 448),
    (449, 447),
    (896, 896),
    (1000, 300),
    (300, 1000),
    (3, 700),
    (10, 10),
    (1080, 1920),
    (4000, 3000),
]


def config(**changes: Any) -> InternVLConfig:
    """InternVL3's, with the settings that its image processor has."""
    result = InternVLConfig(**{"vision_feature_layer": -1, **changes})
    setattr(result, IMAGES, internvl.settings(SimpleNamespace(min_patches=1, max_patches=12), {}))
    return result


def chat_config(**changes: Any) -> Any:
    """InternVL3's in OpenGVLab's format, with the settings of its images."""
    fields = {
        "model_type": "internvl_chat",
        "vision_config": SimpleNamespace(image_size=448, patch_size=14, num_hidden_layers=24),
        "select_layer": -1,
        "ps_version": "v2",
        "downsample_ratio": 0.5,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "dynamic_image_size": True,
        "use_thumbnail": True,
    }
    result = SimpleNamespace(**{**fields, **changes})
    leave_image_settings(result, {}, no_processor)
    return result


def no_processor() -> Any:
    """The settings are those of config.json."""
    raise AssertionError("no image processor is needed")


def planner(**settings: Any) -> VisionPlanner:
    """InternVL3's tower."""
    return VisionPlanner.shared(FicocoConfig.parse(settings), tower_shape(config()))


@pytest.mark.parametrize(("fewest", "most"), [(1, 12), (1, 6), (2, 4), (1, 1), (4, 40)])
def test_as_many_tiles_as_transformers(fewest: int, most: int) -> None:
    processor = GotOcr2ImageProcessor(
        size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=fewest, max_patches=most
    )
    tiling = Mosaic(fewest, most, 448, 16)
    sizes = [*SIZES, *((height, width) for height in range(50, 2500, 287) for width in range(31, 2500, 311))]
    for height, width in sizes:
        expected = processor.get_number_of_image_patches(height, width)
        if most > 1:
            columns, rows = tiling._grid(height, width)
            assert expected == columns * rows + (columns * rows > 1)
        assert len(tiling.places(height, width)) == expected
        assert tiling.num_tokens(height, width) == 256 * expected
        assert [place.crop for place in tiling.places_of(expected)] == [
            place.crop for place in tiling.places(height, width)
        ]
    assert tiling.most_tiles == max(len(tiling.places(*size)) for size in sizes)
    assert tiling.num_tokens(*tiling.largest) == 256 * tiling.most_tiles


@pytest.mark.parametrize("use_thumbnail", [True, False])
@pytest.mark.parametrize("most", [12, 6, 40, 2, 1])
def test_as_many_tiles_as_vllm_in_opengvlabs_format(most: int, use_thumbnail: bool) -> None:
    """The processor needs no tokenizer to count."""
    images = {"max_dynamic_patch": most, "use_thumbnail": use_thumbnail}
    of_images, _, of_prompts = internvl_chat_processors()
    processor = of_prompts.__new__(of_prompts)
    processor.image_processor = of_images(
        image_size=448, min_dynamic_patch=1, dynamic_image_size=True, **images
    )
    processor.image_seq_length = 256
    tiling = tower_shape(chat_config(**images)).tiling
    assert isinstance(tiling, Mosaic)
    sizes = [*SIZES, *((height, width) for height in range(50, 2500, 287) for width in range(31, 2500, 311))]
    for height, width in sizes:
        expected = processor.get_num_image_tokens(image_width=width, image_height=height)
        assert tiling.num_tokens(height, width) == expected
        places = tiling.places(height, width)
        assert [place.row for place in tiling.places_of(len(places))].count(-1) == [
            place.row for place in places
        ].count(-1)
        assert len(tiling.places_of(len(places))) == len(places)
    assert tiling.num_tokens(*tiling.largest) == 256 * tiling.most_tiles


def test_a_tile_shows_its_part_of_the_image() -> None:
    """Each pixel of a gradient says where it comes from."""
    tiling = Mosaic(1, 6, 32, 2)
    processor = GotOcr2ImageProcessor(
        size={"height": 32, "width": 32},
        crop_to_patches=True,
        max_patches=6,
        do_normalize=False,
        do_rescale=False,
        resample=0,
    )
    height, width = 192, 256
    image = torch.stack(
        [
            torch.arange(height)[:, None].expand(height, width),
            torch.arange(width)[None].expand(height, width),
            torch.zeros(height, width),
        ]
    )
    tiles = processor(image, return_tensors="pt")["pixel_values"]
    places = tiling.places(height, width)
    assert len(tiles) == len(places)
    for tile, place in zip(tiles, places, strict=True):
        left, top, across, down = tiling.box(place, height, width)
        rows, columns = tile[0].float(), tile[1].float()
        assert rows.min() == pytest.approx(top * height, abs=height / 32)
        assert rows.max() == pytest.approx((top + down) * height, abs=height / 16)
        assert columns.min() == pytest.approx(left * width, abs=width / 32)
        assert columns.max() == pytest.approx((left + across) * width, abs=width / 16)


def test_budgets() -> None:
    """1080 x 1920 pixels: 8 tiles and a thumbnail; a budget is for each tile, or shared by them."""
    per_tile = planner(method="ficoco-v", keep=64)
    whole = per_tile.num_before(height=1080, width=1920)
    num_tiles = whole // 256
    assert num_tiles == len(per_tile.shape.tiling.places(1080, 1920))
    assert per_tile.num_image_tokens(per_tile.default, height=1080, width=1920) == 64 * num_tiles
    assert per_tile.most_keep == 256
    assert per_tile.num_image_tokens(Budget("ficoco-v", 256), height=1080, width=1920) == whole
    per_image = planner(method="ficoco-v", keep=100, keep_per="image")
    assert per_image.num_image_tokens(per_image.default, height=1080, width=1920) == 100
    assert per_image.most_keep == 256 * 13
    assert planner(method="ficoco-v").default.keep == round(256 / 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer = -2 cannot be reduced; allowed: -1"),
        ({"downsample_ratio": 0.25}, "downsample_ratio = 0.25 cannot be reduced; allowed: 0.5"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy = 'full' cannot be"),
        ({"vision_config": {"image_size": 434}}, r"image_size = \(434, 434\) cannot be reduced"),
    ],
)
def test_models_that_cannot_be_reduced(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tower_shape(config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select_layer": -4}, "select_layer = -4 cannot be reduced; allowed: -1"),
        ({"ps_version": "v1"}, "ps_version = 'v1' cannot be reduced; allowed: 'v2'"),
        ({"downsample_ratio": 0.25}, "downsample_ratio = 0.25 cannot be reduced; allowed: 0.5"),
        ({"min_dynamic_patch": 2}, "min_dynamic_patch = 2 cannot be reduced; allowed: 1"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch = 0 is not allowed; allowed: an integer of at least 1"),
        ({"max_dynamic_patch": "6"}, "max_dynamic_patch = '6' is not allowed"),
        (
            {"vision_config": SimpleNamespace(image_size=434, patch_size=14, num_hidden_layers=24)},
            r"image_size = \(434, 434\) cannot be reduced",
        ),
    ],
)
def test_models_in_opengvlabs_format_that_cannot_be_reduced(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tower_shape(chat_config(**changes))


def test_settings_of_opengvlabs_format() -> None:
    """Those of config.json under those of the server; both formats then have the same tower."""
    assert tower_shape(chat_config()) == tower_shape(config())
    served = chat_config()
    leave_image_settings(served, {"max_dynamic_patch": 4, "use_thumbnail": False}, no_processor)
    tiling = tower_shape(served).tiling
    assert tiling is not None
    assert tiling.most_tiles == 4
    leave_image_settings(served, {"dynamic_image_size": False}, no_processor)
    whole = tower_shape(served).tiling
    assert whole is not None
    assert whole.num_tokens(1080, 1920) == 256
    leave_image_settings(served, {"image_size": 224}, no_processor)
    with pytest.raises(ValueError, match="image_size = 224 cannot be reduced; allowed: 448"):
        tower_shape(served)


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=f"model_type = 'fuyu' is not a known family; allowed: {', '.join(FAMILIES)}"
    ):
        tower_shape(SimpleNamespace(model_type="fuyu"))


def test_settings_of_the_image_processor() -> None:
    """The server's settings count, plain or in the scope of images; InternVL cuts images unless told not to."""
    processor = SimpleNamespace(crop_to_patches=False, min_patches=1, max_patches=12)
    assert internvl.settings(processor, {}) == {"crop_to_patches": True, "min_patches": 1, "max_patches": 12}
    assert internvl.settings(processor, {"max_patches": 4})["max_patches"] == 4
    assert internvl.settings(processor, {"images_kwargs": {"max_patches": 4}})["max_patches"] == 4
    whole = config()
    setattr(whole, IMAGES, internvl.settings(processor, {"crop_to_patches": False}))
    tiling = tower_shape(whole).tiling
    assert tiling is not None
    assert tiling.num_tokens(1080, 1920) == 256
