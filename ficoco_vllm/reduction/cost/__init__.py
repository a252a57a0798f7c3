"""What token reduction saves: FLOPs, KV cache and memory, from the sizes of a model alone.

from ficoco_vllm.reduction.cost import KNOWN_MODELS, Budget, estimate, model_shape, plan_tokens

shape = model_shape(KNOWN_MODELS["llava-hf/llava-1.5-7b-hf"])
plan = plan_tokens(shape, "ficoco-v", Budget(keep=64))
estimate(shape, plan, num_text_tokens=60).decoder_flops
"""

from ficoco_vllm.reduction.cost.budget import Budget
from ficoco_vllm.reduction.cost.estimate import Estimate, Speedup, estimate, speedup
from ficoco_vllm.reduction.cost.known_models import KNOWN_MODELS
from ficoco_vllm.reduction.cost.memory import BITS
from ficoco_vllm.reduction.cost.planning import decoder_tokens, encoder_tokens, plan_tiles, plan_tokens
from ficoco_vllm.reduction.cost.shapes import ModelShape, model_shape
from ficoco_vllm.reduction.cost.tiles import TiledPlan, TilePlan, estimate_tiles
from ficoco_vllm.reduction.cost.tokens import TokenPlan, constant, unreduced

__all__ = [
    "BITS",
    "KNOWN_MODELS",
    "Budget",
    "Estimate",
    "ModelShape",
    "Speedup",
    "TilePlan",
    "TiledPlan",
    "TokenPlan",
    "constant",
    "decoder_tokens",
    "encoder_tokens",
    "estimate",
    "estimate_tiles",
    "model_shape",
    "plan_tiles",
    "plan_tokens",
    "speedup",
    "unreduced",
]
