"""Token counts of Qwen3-VL's images, whose grid follows their size; budgets as a number and as a share."""

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessor

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.families import FAMILIES, qwen3_vl, tower_shape
from ficoco_vllm.planning.resolution import Resolution
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import IMAGES, TowerShape
from ficoco_vllm.reduction.registry import names

# Limits of the tests' model: 4 to 160 units of 16 pixels.
LEAST, MOST = 4 * 256, 160 * 256
LLAVA = TowerShape((24, 24), num_layers=24, num_executed_layers=23, with_cls=False)


def hf_config(model_type: str = "qwen3_vl", **more: Any) -> Any:
    """What a Qwen3-VL-8B says of its tower."""
    vision = SimpleNamespace(
        depth=27, patch_size=16, spatial_merge_size=2, deepstack_visual_indexes=[8, 16, 24]
    )
    return SimpleNamespace(model_type=model_type, vision_config=vision, **more)


def planner(**settings: Any) -> VisionPlanner:
    return VisionPlanner.shared(FicocoConfig.parse(settings), tower_shape(hf_config()))


def plan(**settings: Any) -> ServerPlan:
    """The plan of a server with Qwen3-VL-8B."""
    text = SimpleNamespace(num_hidden_layers=36)
    return ServerPlan.of(FicocoConfig.parse(settings), hf_config(get_text_config=lambda: text))


def test_published_models() -> None:
    for model_type in ("qwen3_vl", "qwen3_vl_moe"):
        shape = tower_shape(hf_config(model_type))
        assert (shape.grid, shape.num_units, shape.unit, shape.num_executed_layers) == (
            (128, 128),
            16384,
            4,
            27,
        )
        assert FAMILIES[model_type].image_settings is qwen3_vl.image_settings
    limits = {"min_pixels": 1024, "max_pixels": 1024 * 1024}
    assert tower_shape(hf_config(**{IMAGES: limits})).grid == (32, 32)


def test_limits_are_read_by_all_their_names() -> None:
    processor = Qwen2VLImageProcessor(size={"shortest_edge": LEAST, "longest_edge": MOST})
    read = {"min_pixels": LEAST, "max_pixels": MOST, "do_resize": True}
    assert qwen3_vl.image_settings(processor, {}) == read
    other: list[dict[str, Any]] = [
        {"max_pixels": 9},
        {"size": {"longest_edge": 9}},
        {"images_kwargs": {"max_pixels": 9}},
        {"images_kwargs": {"size": {"longest_edge": 9}}},
    ]
    for overrides in other:
        assert qwen3_vl.image_settings(processor, overrides) == {**read, "max_pixels": 9}
    assert not qwen3_vl.image_settings(processor, {"do_resize": False})["do_resize"]


def test_grids_are_those_of_the_processor() -> None:
    resolution = Resolution(16, LEAST, MOST)
    processor = Qwen2VLImageProcessor(
        size={"shortest_edge": LEAST, "longest_edge": MOST}, patch_size=8, merge_size=2
    )
    sizes = [(192, 192), (200, 300), (20, 30), (400, 192), (333, 20), (8, 8), (900, 7), (24, 40), (40, 24)]
    sizes += [(17 * index % 613 + 8, 29 * index % 701 + 8) for index in range(80)]
    for height, width in sizes:
        _, rows, columns = processor(Image.new("RGB", (width, height)))["image_grid_thw"][0]
        assert resolution.grid(height, width) == (rows // 2, columns // 2), (height, width)


def test_shrunk_grids_fit_the_budget() -> None:
    resolution = Resolution(32, 65536, 2**24)
    for height, width in ((768, 1024), (32, 6000), (6000, 32), (640, 640)):
        rows, columns = resolution.grid(height, width)
        assert resolution.fit(height, width, rows * columns) == (rows, columns)
        for most in (1, 2, 7, 64, 100):
            fitted = resolution.fit(height, width, most)
            assert 1 <= fitted[0] * fitted[1] <= most
    assert resolution.fit(640, 640, 100) == (10, 10)
    assert resolution.fit(768, 1024, 192) == (12, 16)


def test_budgets_of_images() -> None:
    """A number is the most that stays of any image, a share follows its size."""
    plans = planner(method="ficoco-v", keep=100)
    large, small = {"height": 768, "width": 1024}, {"height": 256, "width": 256}
    assert (plans.num_before(**large), plans.num_before(**small)) == (768, 64)
    assert [plans.num_image_tokens(plans.default, **size) for size in (large, small)] == [100, 64]
    quarter = plans.budget("divprune", None, 0.25)
    assert [plans.num_image_tokens(quarter, **size) for size in (large, small)] == [192, 16]
    tiny = plans.budget(None, None, 1e-9)
    assert plans.num_image_tokens(tiny, **large) == 1
    assert planner(method="tome").default == Budget("tome", round(16384 / 9), 1 / 9)
    assert planner(method="tome", keep_ratio=0.5).default == Budget("tome", 8192, 0.5)
    assert VisionPlanner.shared(FicocoConfig.parse({"keep_ratio": 0.25}), LLAVA).default == Budget(
        "divprune", 144
    )


def test_downscale_counts_the_smaller_image() -> None:
    plans = planner(method="downscale", keep=64)
    assert plans.default.method == "downscale"
    assert plans.num_image_tokens(plans.default, height=768, width=1024) == 6 * 9
    assert plans.num_image_tokens(plans.default, height=640, width=640) == 64
    assert not plans.layout(plans.default, 768, 1024).reduces
    share = plans.budget("downscale", None, 0.25)
    assert plans.num_image_tokens(share, height=640, width=640) == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 0}, "ficoco.keep_ratio = 0"),
        ({"keep_ratio": 1.5}, "ficoco.keep_ratio = 1.5"),
        ({"keep_ratio": 0.5, "keep": 64}, "keep_ratio = 0.5 together with keep = 64"),
        ({"keep_ratio": 0.5, "method": "fastv"}, "keep_ratio = 0.5 together with the decoder's method fastv"),
        ({"method": "downscale", "lam": 0.5}, "lam: downscale has no settings"),
        ({"method": "downscale", "explain": True}, "explain = True is not allowed with downscale"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FicocoConfig.parse(settings)


def test_a_llava_has_no_smaller_image() -> None:
    assert "downscale" in names()
    with pytest.raises(ValueError, match=r"downscale' is not allowed.* dynamic resolution.*divprune"):
        VisionPlanner.shared(FicocoConfig.parse({"method": "downscale"}), LLAVA)
    plans = VisionPlanner.shared(FicocoConfig.parse({"method": "divprune"}), LLAVA)
    with pytest.raises(ValueError, match="ficoco_method = 'downscale'"):
        plans.budget("downscale", 64)
    assert plans.budget(None, None, 0.25) == Budget("divprune", 144)


@pytest.mark.parametrize(("method", "most"), [("ficoco-vl", 3), ("vscan", 3), ("tops", 8)])
def test_the_tower_of_a_pipeline_reduces_ordinary_images(method: str, most: int) -> None:
    """Its budget follows the units of each image, not those of the largest one."""
    large, small = {"height": 768, "width": 1024}, {"height": 256, "width": 256}
    served = plan(method=method)
    left = [served.tower.num_image_tokens(served.tower.default, **size) for size in (large, small)]
    assert left == [round(768 * most / 9), round(64 * most / 9)]
    served = plan(method=method, keep=30)
    left = [served.tower.num_image_tokens(served.tower.default, **size) for size in (large, small)]
    assert left == [30 * most, 64]
    assert (served.tower_keep(10), served.tower_keep(16384)) == (10 * most, 16384)
    served.check_budget(10)


def test_the_tower_of_a_pipeline_may_have_a_share_of_its_own() -> None:
    settings = {"method": "ficoco-vl", "keep": 64, "encoder": {"keep_ratio": 0.5}}
    assert VisionPlanner.shared(FicocoConfig.parse(settings), LLAVA).default == Budget("ficoco-v", 288)
    served = plan(**settings)
    assert served.tower.num_image_tokens(served.tower.default, height=768, width=1024) == 384
    assert not served.tower_follows
    assert served.tower_keep(9) == 8192
