"""What the explanation must know of the served model: bytes of a cached token, and which part of an image is seen."""

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
class Facts:
    """Of one served model.

    Attributes:
        shape: of the vision tower.
        num_layers: of the decoder.
        token_bytes: KV cache of one token in one layer, over all workers.
        central_square: as in `Explanation`.
        method: that the server was started with.
        keep: its budget.
        methods: that a request may name.
        in_tower: whether anything is reduced in the tower.
        in_decoder: whether anything is reduced in the decoder.
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
    def of(cls, vllm_config: Any) -> "Facts":
        """Read them off vLLM's configuration, which has a method.

        Args:
            vllm_config: checked by `FicocoModelConfig`.
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
            found = [get(name) for name in sorted(names)]
            choices = [MethodChoice(name=m.name, title=m.title, site=m.site) for m in found]
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
        """Visual tokens of the image as it enters the decoder, and in its last layer.

        Args:
            steps: of its trace; none, if nothing left.
        """
        entering, last = self.shape.num_patches + self.shape.with_cls, None
        for step in steps:
            if step.site != "decoder":
                entering = len(step.kept) + self.shape.with_cls
            last = len(step.kept) if step.site == "decoder" else entering
        return entering, entering if last is None else last

    def check_complete(self, steps: Sequence[Step], keep: int | None) -> None:
        """Find out whether a trace tells of the whole way.

        Args:
            steps: of a trace.
            keep: the budget of its request; None: without reduction.

        Raises:
            ValueError: a part of it is missing.
        """
        entering, last = self.visual_tokens(steps)
        if keep is None:
            keep = self.shape.num_patches + self.shape.with_cls
        elif not self.in_decoder:  # there [CLS] is one of the tokens that are counted
            keep += self.shape.with_cls
        if last != min(keep, entering):
            raise ValueError(
                f"the trace is incomplete: it ends with {last} visual tokens, the budget is {keep}"
            )

    def kv_bytes(self, num_prompt_tokens: int, steps: Sequence[Step]) -> int:
        """KV cache of a prompt with one image, over all layers.

        Args:
            num_prompt_tokens: that entered the decoder.
            steps: of the image's trace; what leaves behind the attention of a layer is missing from the next on.
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
    """Which part of an image its processor shows the model: see `Explanation.central_square`.

    Args:
        image_processor: transformers' image processor of a CLIP tower.
    """
    size, crop = image_processor.size, image_processor.crop_size
    shortest = size.get("shortest_edge") if hasattr(size, "get") else getattr(size, "shortest_edge", None)
    if not (shortest and image_processor.do_center_crop):
        return None
    return float(crop["height"] / shortest)
