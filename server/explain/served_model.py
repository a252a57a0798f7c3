"""Facts about the served model that an explanation needs: KV cache bytes, methods, and the visible part of an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction import get
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.server.explain.schema import MethodChoice
from ficoco_vllm.tracing.chain import Step


@dataclass(frozen=True)
class ServedModel:
    """The served model and its reduction.

    Attributes:
        shape: shape of the vision tower.
        num_layers: layers of the decoder.
        token_bytes: KV cache of one token in one layer, over all workers.
        central_square: see `Explanation`.
        method: the server's method.
        keep: the server's budget.
        methods: methods that a request may name.
        in_tower: whether the tower reduces.
        in_decoder: whether the decoder reduces.
    """

    shape: TowerShape
    num_layers: int
    token_bytes: int
    central_square: float | None
    method: str
    keep: int
    methods: tuple[MethodChoice, ...]
    in_tower: bool
    in_decoder: bool

    @classmethod
    def of(cls, vllm_config: Any) -> "ServedModel":
        """Read vLLM's configuration.

        Args:
            vllm_config: configuration with a method, checked by `FicocoModelConfig`.
        """
        from vllm.transformers_utils.processor import cached_image_processor_from_config
        from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

        model = vllm_config.model_config
        plan = ServerPlan.served(model.hf_config)
        config, tower = plan.config, plan.tower
        assert config.method is not None
        if plan.decoder is None:
            names, keep = tower.methods, tower.default.keep
        else:
            names, keep = plan.decoder.methods, plan.decoder.keep
        if config.method in PIPELINES:
            pipeline = PIPELINES[config.method]
            choices = [MethodChoice(name=pipeline.name, title=pipeline.title, site="decoder")]
        else:
            methods = [get(name) for name in sorted(names)]
            choices = [
                MethodChoice(name=method.name, title=method.title, site=method.site) for method in methods
            ]
        dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model)
        return cls(
            shape=tower.shape,
            num_layers=plan.num_layers,
            token_bytes=2 * model.get_total_num_kv_heads() * model.get_head_size() * dtype.itemsize,
            central_square=central_square(cached_image_processor_from_config(model)),
            method=config.method,
            keep=keep,
            methods=tuple(choices),
            in_tower=tower.active,
            in_decoder=plan.decoder is not None,
        )

    def visual_tokens(self, steps: Sequence[Step]) -> tuple[int, int]:
        """Count the visual tokens of an image that enter the decoder, and those in its last layer.

        Args:
            steps: trace of the image; empty if no token was removed.
        """
        entering, last = self.shape.num_patches + self.shape.with_cls, None
        for step in steps:
            if step.site != "decoder":
                entering = len(step.kept) + self.shape.with_cls
            last = len(step.kept) if step.site == "decoder" else entering
        return entering, entering if last is None else last

    def check_complete(self, steps: Sequence[Step], keep: int | None) -> None:
        """Check that a trace covers all reductions of its request.

        Args:
            steps: trace of an image.
            keep: budget of the request; None without reduction.

        Raises:
            ValueError: a part is missing.
        """
        entering, last = self.visual_tokens(steps)
        if keep is None:
            keep = self.shape.num_patches + self.shape.with_cls
        elif not self.in_decoder:  # a budget of the decoder counts [CLS] itself
            keep += self.shape.with_cls
        if last != min(keep, entering):
            raise ValueError(
                f"the trace is incomplete: it ends with {last} visual tokens, the budget is {keep}"
            )

    def kv_bytes(self, num_prompt_tokens: int, steps: Sequence[Step]) -> int:
        """KV cache of a prompt with one image, over all layers.

        Args:
            num_prompt_tokens: tokens that enter the decoder.
            steps: trace of the image; a token removed in a layer still has its entry there, and none in later layers.
        """
        entering, _ = self.visual_tokens(steps)
        num_tokens = self.num_layers * num_prompt_tokens
        before = entering
        for step in steps:
            if step.site == "decoder":
                num_tokens -= (before - len(step.kept)) * (self.num_layers - 1 - step.layer)
                before = len(step.kept)
        return num_tokens * self.token_bytes


def central_square(image_processor: Any) -> float | None:
    """Visible part of an image, see `Explanation.central_square`.

    Args:
        image_processor: transformers' image processor of a CLIP tower.
    """
    size, crop = image_processor.size, image_processor.crop_size
    shortest = size.get("shortest_edge") if hasattr(size, "get") else getattr(size, "shortest_edge", None)
    if not (shortest and image_processor.do_center_crop):
        return None
    return float(crop["height"] / shortest)
