"""The rows of `make bench-ttft`, stock vLLM and ours by method and budget, with their predicted speed-ups."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ficoco_vllm.benchmarks.harness import model
from ficoco_vllm.benchmarks.harness.model import WHOLE_MODELS
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.reduction.cost import Device, TokenPlan, model_shape, predict, unreduced

NUM_TEXT_TOKENS = 60
PATCHES = model.PATCHES
SMALLEST = 64
# Decoder layers of LLaVA-1.5-7B, to which times are extrapolated.
WHOLE_MODEL = WHOLE_MODELS["7b"]


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


STOCK = Kind("stock", None, PATCHES)
_V = {"method": "ficoco-v", "keep": SMALLEST}
ENCODER_KINDS = tuple(Kind(f"keep-{keep}", _V, keep) for keep in (PATCHES, 192, 128, SMALLEST))
DECODER_KINDS = (
    Kind("ficoco-l", {"method": "ficoco-l", "keep": SMALLEST}, SMALLEST, True),
    Kind(
        "ficoco-l-one-shot", {"method": "ficoco-l", "keep": SMALLEST, "schedule": "one-shot"}, SMALLEST, True
    ),
    Kind("ficoco-vl", {"method": "ficoco-vl", "keep": SMALLEST}, SMALLEST, True),
)
KINDS = {kind.name: kind for kind in (STOCK, *ENCODER_KINDS, *DECODER_KINDS)}


def token_plan(kind: Kind, num_layers: int, size: str = "7b") -> TokenPlan:
    """Visual tokens layer by layer, as the engine serves them."""
    shape = model_shape(model.config(num_layers, size))
    if kind.settings is None:
        return unreduced(shape)
    config = FicocoConfig.model_validate({**kind.settings, "keep": kind.keep})
    return ServerPlan.for_model(config, shape).image_tokens()


def predicted_speedup(kind: Kind, num_layers: int, device: Device, size: str = "7b") -> float:
    """Ratio of the least times to the first token on a device, without reduction over with it."""
    shape = model_shape(model.config(num_layers, size))
    plans = (unreduced(shape), token_plan(kind, num_layers, size))
    full, reduced = (
        predict(shape, plan, device, num_text_tokens=NUM_TEXT_TOKENS).ttft_seconds for plan in plans
    )
    return full / reduced
