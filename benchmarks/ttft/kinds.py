"""The rows of `make bench-ttft`, stock vLLM and ours by method and budget, with their predicted times."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
        settings: of our engine; None is stock vLLM without any plugin.
        keep: visual tokens that are left in the end.
        in_decoder: whether the method works in the decoder, which needs model runner V2.
    """

    name: str
    settings: Mapping[str, Any] | None
    keep: int
    in_decoder: bool = field(default=False)


def stock(size: str) -> Kind:
    """Stock vLLM, without any plugin.

    Args:
        size: one of `MODELS`.
    """
    return Kind("stock", None, MODELS[size].keeps[0])


def encoder_kinds(size: str) -> tuple[Kind, ...]:
    """FiCoCo-V with all tokens of an image, down to about a ninth; see `stock`."""
    keeps = MODELS[size].keeps
    return tuple(Kind(f"keep-{keep}", {"method": "ficoco-v", "keep": keeps[-1]}, keep) for keep in keeps)


def whole_kinds(size: str) -> tuple[Kind, ...]:
    """Rows that are extrapolated to all layers of the decoder; see `stock`."""
    return (*encoder_kinds(size), *control_kinds(size))


def decoder_kinds(size: str) -> tuple[Kind, ...]:
    """Methods of the decoder with about a ninth of the tokens; see `stock`."""
    keep = MODELS[size].keeps[-1]
    settings: dict[str, dict[str, Any]] = {
        "ficoco-l": {"method": "ficoco-l"},
        "ficoco-l-one-shot": {"method": "ficoco-l", "schedule": "one-shot"},
        "ficoco-vl": {"method": "ficoco-vl"},
    }
    return tuple(Kind(name, {**given, "keep": keep}, keep, True) for name, given in settings.items())


def control_kinds(size: str) -> tuple[Kind, ...]:
    """Controls: as many tokens chosen at random, and a smaller image where the model takes any size; see `stock`."""
    keep = MODELS[size].keeps[-1]
    names = ("random", "downscale") if MODELS[size].family == "qwen3_vl" else ("random",)
    return tuple(Kind(name, {"method": name, "keep": keep}, keep) for name in names)


def kinds(size: str) -> dict[str, Kind]:
    """All rows by name; see `stock`."""
    return {kind.name: kind for kind in (stock(size), *whole_kinds(size), *decoder_kinds(size))}


# Those of LLaVA-1.5, which other benchmarks share.
PATCHES, SMALLEST = MODELS["7b"].keeps[0], MODELS["7b"].keeps[-1]
WHOLE_MODEL = MODELS["7b"].num_layers
STOCK, ENCODER_KINDS, DECODER_KINDS, KINDS = (
    stock("7b"),
    encoder_kinds("7b"),
    decoder_kinds("7b"),
    kinds("7b"),
)


def token_plan(kind: Kind, num_layers: int, size: str = "7b") -> TokenPlan:
    """Visual tokens layer by layer, as the engine serves them."""
    used = MODELS[size]
    hf_config = hf_config_of(used.config(num_layers), used.images)
    settings = {"method": "ficoco-v"} if kind.settings is None else kind.settings
    plan = ServerPlan.of(FicocoConfig.model_validate({**settings, "keep": kind.keep}), hf_config)
    pixels = None if plan.tower.shape.tiling is None else (used.side, used.side)
    return plan.unreduced(pixels) if kind.settings is None else plan.image_tokens(size=pixels)


def predicted_ttft(kind: Kind, num_layers: int, device: Device, size: str = "7b") -> float:
    """The least time to the first token on a device, in seconds."""
    used = MODELS[size]
    plan, num_text = token_plan(kind, num_layers, size), NUM_TEXT_TOKENS + used.num_around
    return predict(model_shape(used.config(num_layers)), plan, device, num_text_tokens=num_text).ttft_seconds


def predicted_speedup(kind: Kind, num_layers: int, device: Device, size: str = "7b") -> float:
    """Ratio of the least times to the first token on a device, without reduction over with it."""
    full, reduced = (predicted_ttft(one, num_layers, device, size) for one in (stock(size), kind))
    return full / reduced
