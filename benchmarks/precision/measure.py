"""Kept tokens and log-probabilities in half precision, against float64, on transformers' models."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ficoco_vllm import demo_model
from ficoco_vllm.benchmarks.harness import model as shapes
from ficoco_vllm.benchmarks.questions.held_out import held_out
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.hf import reduce_tokens
from ficoco_vllm.hf.tower import HfTower
from ficoco_vllm.planning.families import tower_shape
from ficoco_vllm.planning.tower import VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction.observation import Observation
from ficoco_vllm.vision.tower import encode

PRECISIONS: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = torch.float8_e4m3fn
# Rows of the log-probabilities: None is the model without a reduction.
VARIANTS: Mapping[str, dict[str, Any] | None] = {
    "none": None,
    "ficoco-v": {"method": "ficoco-v", "keep": 64},
    "divprune": {"method": "divprune", "keep": 64},
    "ficoco-l": {"method": "ficoco-l", "keep": 64},
}


def demo(dtype: torch.dtype = torch.float64) -> Any:
    """The demo model, trained weights, which bfloat16 holds exactly."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(demo_model.path(), dtype=dtype).eval()


def wide(layers: int | None, seed: int) -> tuple[Any, TowerShape]:
    """A tower of LLaVA-1.5's widths with random weights, rounded to bfloat16, in float64; and its sizes.

    It has `layers` layers, or all 24 of the checkpoint.
    """
    from transformers import CLIPVisionModel, LlavaConfig

    config = LlavaConfig(**shapes.config(1))
    if layers is not None:
        config.vision_config.num_hidden_layers = layers
    torch.manual_seed(seed)
    tower = CLIPVisionModel(config.vision_config).eval().to(torch.bfloat16).to(torch.float64)
    return tower, tower_shape(config)


def differing(
    tower: Any, shape: TowerShape, images: Tensor, method: str, keep: int
) -> dict[str, dict[str, list[float]]]:
    """Share of the kept tokens of a tower in float64 that another precision does not keep.

    Returns:
        For each precision `share`, one figure a reducing layer, and `feature_error`: of the output of the tower
        without a reduction, the norm of its error over its own norm.
    """
    planner = VisionPlanner.shared(FicocoConfig.parse({"method": method, "keep": keep}), shape)
    plan = planner.plan(planner.default)

    @torch.inference_mode()
    def kept_and_features(dtype: torch.dtype) -> tuple[list[list[Tensor]], Tensor]:
        # A copy: float16 does not hold the least of the weights, and the next method starts from exact ones again.
        cast = copy.deepcopy(tower).to(dtype)
        kept: list[list[Tensor]] = []  # of each image, those after each reducing layer

        def observer(site: str, layer: int) -> Callable[[Observation], None]:
            return lambda observation: kept[-1].append(observation.position[0])

        for image in images.to(dtype):
            kept.append([])
            layers = HfTower(cast, shape.num_executed_layers)
            encode(layers, image[None], plan, shape.grid, observers=observer)
        return kept, HfTower(cast, shape.num_executed_layers).features(images.to(dtype)).double()

    exact_kept, exact = kept_and_features(torch.float64)
    rows = {}
    for name, dtype in PRECISIONS.items():
        kept, features = kept_and_features(dtype)
        shares = [map(_share, one, other) for one, other in zip(exact_kept, kept, strict=True)]
        rows[name] = {
            "share": [fmean(layer) for layer in zip(*shares, strict=True)],
            "feature_error": [float((features - exact).norm() / exact.norm())],
        }
    return rows


def _share(exact: Tensor, other: Tensor) -> float:
    """Share of the exact choice that the other one does not hold."""
    return 1.0 - float(torch.isin(exact, other).double().mean())


def log_probabilities(num_questions: int, seed: int = 0) -> dict[str, dict[str, dict[str, float]]]:
    """Errors of the demo model's first answer token, by variant and precision.

    Returns:
        `mean` and `most` over the questions of the mean error of a log-probability, over the vocabulary; `changed`, the
        share of the questions whose most probable token is another one.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(demo_model.path())
    asked = [
        processor(
            text=f"<s>USER: <image>\n{one.question.text} ASSISTANT:",
            images=one.scene.image,
            return_tensors="pt",
            add_special_tokens=False,
        )
        for one in held_out("number_by_colour_2", num_questions, seed)
    ]
    exact = {variant: _answers(demo(), asked, settings) for variant, settings in VARIANTS.items()}
    rows: dict[str, dict[str, dict[str, float]]] = {variant: {} for variant in VARIANTS}
    kinds: dict[str, tuple[torch.dtype, AbstractContextManager[Any]]] = {
        "fp8-kv": (torch.float64, fp8_cache()),
        **{name: (dtype, nullcontext()) for name, dtype in PRECISIONS.items()},
    }
    for name, (dtype, context) in kinds.items():
        # Loaded anew, since `to` casts what loading leaves in float32: the frequencies of rotary positions.
        model = demo(dtype)
        with context:
            for variant, settings in VARIANTS.items():
                rows[variant][name] = _errors(exact[variant], _answers(model, asked, settings))
    return rows


def _answers(model: Any, asked: Sequence[Any], settings: dict[str, Any] | None) -> Tensor:
    """Log-probabilities of the first token of each answer, (questions, vocabulary) fp64."""
    rows = []
    with torch.inference_mode(), nullcontext() if settings is None else reduce_tokens(model, **settings):
        for inputs in asked:
            given = {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}
            rows.append(model(**given, use_cache=True).logits[0, -1].double().log_softmax(-1))
    return torch.stack(rows)


def _errors(exact: Tensor, other: Tensor) -> dict[str, float]:
    errors = (other - exact).abs().mean(dim=-1)
    changed = (exact.argmax(-1) != other.argmax(-1)).double()
    return {"mean": float(errors.mean()), "most": float(errors.max()), "changed": float(changed.mean())}


@contextmanager
def fp8_cache() -> Iterator[None]:
    """Round keys and values as an fp8 KV cache with scale 1 holds them; attention reads the rounded ones."""
    from transformers import DynamicCache

    update = DynamicCache.update

    def rounded(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = (x.float().to(FP8).to(x.dtype) for x in (keys, values))
        return update(self, keys, values, *args, **kwargs)

    with patch.object(DynamicCache, "update", rounded):
        yield
