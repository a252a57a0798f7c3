"""vLLM's renderer with our processor, without an engine: images that a request names by uuid, and odd ones."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.renderers import renderer_from_config

from ficoco_vllm.config import NAME, FicocoConfig
from ficoco_vllm.hooks.processor_cache import hook_processor_cache, note_sent
from ficoco_vllm.metrics.savings import SavingsPlanner
from ficoco_vllm.plugin import register
from ficoco_vllm.request_fields import BUDGET, SIZES

pytestmark = pytest.mark.compat

TOWER, DECODER = {"method": "ficoco-v", "keep": 36}, {"method": "ficoco-l", "keep": 9}
PROMPT = [1, 4, 7, 8]  # <s>, <image>, two words


class Renderer:
    """One of vLLM's renderers, with settings of ours."""

    def __init__(self, model: Path, ficoco: dict[str, Any], **options: Any) -> None:
        api_servers = options.pop("api_servers", 1)
        config = EngineArgs(
            str(model), enforce_eager=True, max_model_len=2048, limit_mm_per_prompt={"image": 8}, **options
        ).create_engine_config()
        config.parallel_config._api_process_count = api_servers
        hf_config = config.model_config.hf_config
        if ficoco:
            setattr(hf_config, NAME, FicocoConfig.parse(ficoco).model_dump(mode="json"))
        self.savings_planner = SavingsPlanner.of(hf_config)
        self.renderer = renderer_from_config(config)

    def render(self, image: Any, uuid: str | None = None, **kwargs: Any) -> Any:
        """Render one prompt with one image, and let its engine have it."""
        prompt: dict[str, Any] = {"prompt_token_ids": list(PROMPT), "multi_modal_data": {"image": image}}
        if uuid is not None:
            prompt["multi_modal_uuids"] = {"image": [uuid]}
        rendered = self.renderer.process_for_engine(prompt | {"mm_processor_kwargs": kwargs}, 0.0)
        note_sent(self.renderer.mm_processor_cache, rendered)
        return rendered

    def savings(self, rendered: Any) -> Any:
        """Savings of a rendered prompt."""
        places = [(place.offset, place.length) for place in rendered["mm_placeholders"]["image"]]
        return self.savings_planner.compute(
            len(rendered["prompt_token_ids"]), places, rendered[BUDGET], None, rendered[SIZES]
        )


@pytest.fixture
def make(random_llava: Path, random_next: Path) -> Iterator[Any]:
    """Makes a renderer."""
    register()
    hook_processor_cache()
    with ExitStack() as stack:

        def get(model: str, method: str | None, **options: Any) -> Renderer:
            settings = {None: {}, "ficoco-v": TOWER, "ficoco-l": DECODER}[method]
            options = {"mm_processor_cache_gb": 0.1} | options
            made = Renderer({"llava": random_llava, "next": random_next}[model], settings, **options)
            stack.callback(made.renderer.shutdown)
            return made

        yield get


def picture(width: int = 150, height: int = 100) -> Image.Image:
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


@pytest.mark.parametrize("model", ["llava", "next"])
@pytest.mark.parametrize("method", [None, "ficoco-v", "ficoco-l"])
@pytest.mark.parametrize(
    "options",
    [{}, {"mm_processor_cache_type": "shm"}, {"api_servers": 2}],
    ids=["lru", "shm", "several servers"],
)
def test_a_cached_image_by_uuid(make: Any, model: str, method: str | None, options: dict[str, Any]) -> None:
    """The prompt and the savings are those of the image in the cache, whatever the server reduces."""
    renderer = make(model, method, **options)
    first = renderer.render(picture(), "sign")
    again = renderer.render([None], "sign")
    assert again["prompt_token_ids"] == first["prompt_token_ids"]
    assert again["mm_hashes"] == first["mm_hashes"]
    assert again[SIZES] == first[SIZES] == ((100, 150),)
    assert renderer.savings(again) == renderer.savings(first)
    # Another image under this uuid: the cached one counts, as in vLLM.
    other = renderer.render(picture(90, 260), "sign")
    assert other["prompt_token_ids"] == first["prompt_token_ids"]
    assert other[SIZES] == first[SIZES]
    with pytest.raises(ValueError, match="Cache miss for image at index 0 but data is not provided"):
        renderer.render([None], "another sign")


def test_another_budget_is_another_cached_image(make: Any) -> None:
    renderer = make("next", "ficoco-v")
    default = renderer.render(picture(), "building")
    for kwargs in ({"ficoco_keep": 40}, {"ficoco_method": "topk-cls"}):
        with pytest.raises(ValueError, match="Cache miss"):
            renderer.render([None], "building", **kwargs)
        given = renderer.render(picture(), "building", **kwargs)
        assert given["mm_hashes"] != default["mm_hashes"]
        cached = renderer.render([None], "building", **kwargs)
        assert renderer.savings(cached) == renderer.savings(given)
        assert cached[BUDGET] == given[BUDGET] != default[BUDGET]
    assert renderer.savings(renderer.render([None], "building")) == renderer.savings(default)


def test_a_uuid_needs_a_cache(make: Any) -> None:
    renderer = make("llava", "ficoco-v", mm_processor_cache_gb=0)
    renderer.render(picture(), "sign")
    assert renderer.render(np.zeros((40, 60, 3), np.uint8), "array")[SIZES] == ((40, 60),)
    with pytest.raises(ValueError, match="uuid alone needs a processor cache, which is off"):
        renderer.render([None], "sign")


@pytest.mark.parametrize("image", ["sign.png", np.zeros((8, 8), np.uint8), [np.zeros((8, 8), np.uint8)], [5]])
@pytest.mark.parametrize("model", ["llava", "next"])
@pytest.mark.parametrize("method", [None, "ficoco-v", "ficoco-l"])
def test_no_images_get_vllm_s_error(make: Any, model: str, method: str | None, image: Any) -> None:
    renderer = make(model, method)
    with pytest.raises(ValueError, match=r"^Failed to apply Llava(Next)?Processor on data="):
        renderer.render(image)


@pytest.mark.parametrize("image", [np.zeros((40, 60, 3), np.uint8), [torch.zeros(3, 40, 60)]])
def test_arrays_are_images(make: Any, image: Any) -> None:
    assert make("next", "ficoco-v").render(image)[SIZES] == ((40, 60),)


def test_integers_of_numpy(make: Any) -> None:
    renderer = make("llava", "ficoco-v")
    numpy_s, python_s = (renderer.render(picture(), ficoco_keep=keep) for keep in (np.int64(40), 40))
    assert numpy_s["mm_hashes"] == python_s["mm_hashes"]
    assert numpy_s[BUDGET] == python_s[BUDGET]


def test_embeddings_take_no_budget_of_the_tower(make: Any) -> None:
    """The tower does not see them. All tokens are what they keep anyway."""
    renderer = make("llava", "ficoco-v", enable_mm_embeds=True)
    hidden = renderer.renderer.model_config.get_inputs_embeds_size()
    embeddings = torch.zeros(1, 20, hidden)
    for kwargs in ({"ficoco_keep": 36}, {"ficoco_method": "topk-cls"}):
        with pytest.raises(
            VLLMValidationError, match="ficoco together with image_embeds is not allowed"
        ) as caught:
            renderer.render(embeddings, **kwargs)
        assert caught.value.parameter == "ficoco"
    for kwargs in ({}, {"ficoco_keep": 576}):
        assert renderer.render(embeddings, **kwargs)["mm_placeholders"]["image"][0].length == 20
    with pytest.raises(
        VLLMValidationError, match=r"^ficoco is not a field of this server; allowed: ficoco_keep"
    ):
        renderer.render(picture(), ficoco={"keep": 9})
