"""Cost model of token reduction: FLOPs, KV cache and memory, from token counts and the sizes of a model.

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.reduction.cost import KNOWN_MODELS, estimate, model_shape

shape = model_shape(KNOWN_MODELS["llava-hf/llava-1.5-7b-hf"])
plan = ServerPlan.for_model(FicocoConfig(method="ficoco-v", keep=64), shape)
estimate(shape, plan.image_tokens(), num_text_tokens=60).decoder_flops
"""

from ficoco_vllm.reduction.cost.configurations import model_shape
from ficoco_vllm.reduction.cost.estimate import Estimate, Speedup, estimate, estimate_prompt, speedup
from ficoco_vllm.reduction.cost.known_models import KNOWN_MODELS
from ficoco_vllm.reduction.cost.memory import BITS
from ficoco_vllm.reduction.cost.roofline import DEVICES, Device, Times, predict, reached
from ficoco_vllm.reduction.cost.shapes import ModelShape
from ficoco_vllm.reduction.cost.tokens import TilePlan, TokenPlan, constant, unreduced

__all__ = [
    "BITS",
    "DEVICES",
    "KNOWN_MODELS",
    "Device",
    "Estimate",
    "ModelShape",
    "Speedup",
    "TilePlan",
    "Times",
    "TokenPlan",
    "constant",
    "estimate",
    "estimate_prompt",
    "model_shape",
    "predict",
    "reached",
    "speedup",
    "unreduced",
]
