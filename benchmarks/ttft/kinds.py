"""The rows of `make bench-ttft`, stock vLLM and ours by method and budget, with their predicted times."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.benchmarks.harness import model
from ficoco_vllm.benchmarks.ttft.models import MODELS
from ficoco_vllm.benchmarks.ttft.models import NUM_TEXT_TOKENS as NUM_TEXT_TOKENS
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.configurations import hf_config_of
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.reduction.cost import Device, TokenPlan, model_shape, predict


@dataclass(frozen=True)
class Kind:
    """One row of the benchmark.

    Attributes:
        settings: settings of our engine; rows with equal settings share an engine. None is stock vLLM without plugins.
        keep: visual tokens that are left in the end.
        in_decoder: whether the method works in the decoder, which needs model runner V2.
    """

    name: str
    settings: Mapping[str, Any] | None
    keep: int
    in_decoder: bool = False


def kinds(size: str) -> dict[str, Kind]:
    """All rows of a model, one of `MODELS`, by name.

    Stock vLLM; FiCoCo-V with all tokens of an image, down to about a ninth; with as few, controls: tokens chosen at
    random, and a smaller image where the model takes any size; with as few, the methods of the decoder.
    """
    keeps, least = MODELS[size].keeps, MODELS[size].keeps[-1]
    controls = ("random", "downscale") if MODELS[size].family == "qwen3_vl" else ("random",)
    decoder: dict[str, dict[str, Any]] = {
        "ficoco-l": {"method": "ficoco-l"},
        "ficoco-l-one-shot": {"method": "ficoco-l", "schedule": "one-shot"},
        "ficoco-vl": {"method": "ficoco-vl"},
    }
    rows = (
        Kind("stock", None, keeps[0]),
        *(Kind(f"keep-{keep}", {"method": "ficoco-v", "keep": least}, keep) for keep in keeps),
        *(Kind(name, {"method": name, "keep": least}, least) for name in controls),
        *(Kind(name, {**given, "keep": least}, least, in_decoder=True) for name, given in decoder.items()),
    )
    return {row.name: row for row in rows}


# Those of LLaVA-1.5, which other benchmarks share.
KINDS = kinds("7b")
STOCK = KINDS["stock"]
ENCODER_KINDS = tuple(kind for kind in KINDS.values() if kind.name.startswith("keep-"))
DECODER_KINDS = tuple(kind for kind in KINDS.values() if kind.in_decoder)
PATCHES, SMALLEST = MODELS["7b"].keeps[0], MODELS["7b"].keeps[-1]


def token_plan(kind: Kind, num_layers: int, size: str = "7b") -> TokenPlan:
    """Visual tokens layer by layer, as the engine serves them."""
    used = MODELS[size]
    hf_config = hf_config_of(model.config(num_layers, used.checkpoint), used.images)
    settings = {"method": "ficoco-v"} if kind.settings is None else kind.settings
    plan = ServerPlan.of(FicocoConfig.model_validate({**settings, "keep": kind.keep}), hf_config)
    pixels = None if plan.tower.shape.tiling is None else (used.side, used.side)
    return plan.unreduced(pixels) if kind.settings is None else plan.image_tokens(size=pixels)


def predicted_ttft(kind: Kind, num_layers: int, device: Device, size: str = "7b") -> float:
    """The least time to the first token on a device, in seconds."""
    used, plan = MODELS[size], token_plan(kind, num_layers, size)
    shape = model_shape(model.config(num_layers, used.checkpoint))
    return predict(shape, plan, device, num_text_tokens=NUM_TEXT_TOKENS + used.num_around).ttft_seconds


def predicted_speedup(kind: Kind, num_layers: int, device: Device, size: str = "7b") -> float:
    """Ratio of the least times to the first token on a device, without reduction over with it."""
    full, reduced = (predicted_ttft(one, num_layers, device, size) for one in (kinds(size)["stock"], kind))
    return full / reduced
