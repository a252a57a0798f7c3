"""The methods that ship with the plugin, by name."""

from collections.abc import Mapping

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.methods.best import BEST
from ficoco_vllm.reduction.methods.cdpruner import CDPRUNER
from ficoco_vllm.reduction.methods.divprune import DIVPRUNE
from ficoco_vllm.reduction.methods.evit import EVIT
from ficoco_vllm.reduction.methods.fastv import FASTV
from ficoco_vllm.reduction.methods.ficoco_l import FICOCO_L
from ficoco_vllm.reduction.methods.ficoco_v import FICOCO_V
from ficoco_vllm.reduction.methods.fitprune import FITPRUNE
from ficoco_vllm.reduction.methods.prumerge import PRUMERGE, PRUMERGE_PLUS
from ficoco_vllm.reduction.methods.pyramiddrop import PYRAMIDDROP
from ficoco_vllm.reduction.methods.random_sampling import RANDOM
from ficoco_vllm.reduction.methods.recoverable import RECOVERABLE
from ficoco_vllm.reduction.methods.sparsevlm import SPARSEVLM
from ficoco_vllm.reduction.methods.spatial_pool import SPATIAL_POOL
from ficoco_vllm.reduction.methods.tome import TOME
from ficoco_vllm.reduction.methods.topk_cls import TOPK_CLS
from ficoco_vllm.reduction.methods.trim import TRIM
from ficoco_vllm.reduction.methods.turbo import TURBO
from ficoco_vllm.reduction.methods.visionzip import VISIONZIP

_ENCODER = (FICOCO_V, TOME, TURBO, EVIT, BEST)
_FEATURES = (
    RANDOM,
    TOPK_CLS,
    SPATIAL_POOL,
    PRUMERGE,
    PRUMERGE_PLUS,
    VISIONZIP,
    DIVPRUNE,
    CDPRUNER,
    TRIM,
    RECOVERABLE,
)
_DECODER = (FICOCO_L, FASTV, SPARSEVLM, PYRAMIDDROP, FITPRUNE)

BUILTIN: Mapping[str, Method] = {method.name: method for method in (*_ENCODER, *_FEATURES, *_DECODER)}
