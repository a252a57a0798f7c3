"""Facts about the served model that an explanation needs: KV cache bytes, methods, and the visible part of an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.reduction import get
from ficoco_vllm.reduction.control import CONTROLS
from ficoco_vllm.reduction.method import Method, Site
from ficoco_vllm.reduction.pipeline import PIPELINES, Pipeline
from ficoco_vllm.server.explain.schema import MethodChoice
from ficoco_vllm.server.explain.views import TracedImage
from ficoco_vllm.tracing.chain import Step

# The line of a third party's method that brings none.
_SUMMARIES: Mapping[Site, str] = {
    "encoder": "Reduces tokens layer by layer in the vision tower.",
    "features": "Reduces tokens once, after the vision tower.",
    "decoder": "Reduces tokens layer by layer in the language model.",
}


@dataclass(frozen=True)
class ServedModel:
    """The served model and its reduction.

    Attributes:
        tower: planner of the vision tower.
        num_layers: layers of the decoder.
        token_bytes: KV cache of one token in one layer, over all workers.
        central_square: see `Explanation`.
        method: the server's method.
        keep: the server's budget; None where it follows the size of each image.
        most: the largest budget.
        methods: methods that a request may name.
        in_decoder: whether the decoder reduces.
    """

    tower: VisionPlanner
    num_layers: int
    token_bytes: int
    central_square: float | None
    method: str
    keep: int | None
    most: int
    methods: tuple[MethodChoice, ...]
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
            names = tower.methods
        else:
            names = plan.decoder.methods
        if config.method in PIPELINES:
            pipeline = PIPELINES[config.method]
            choices = [choice(pipeline, "decoder")]
        else:
            methods = [get(name) for name in sorted(set(names) - set(CONTROLS))]
            choices = [choice(method, method.site) for method in methods]
        dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model)
        return cls(
            tower=tower,
            num_layers=plan.num_layers,
            token_bytes=2 * model.get_total_num_kv_heads() * model.get_head_size() * dtype.itemsize,
            central_square=None
            if tower.shape.tiling
            else central_square(cached_image_processor_from_config(model)),
            method=config.method,
            keep=default_keep(plan),
            most=plan.most,
            methods=tuple(choices),
            in_decoder=plan.decoder is not None,
        )

    @property
    def in_tower(self) -> bool:
        """Whether the tower reduces."""
        return self.tower.active

    def image(self, budget: Budget, size: tuple[int, int]) -> TracedImage:
        """Plan an image.

        Args:
            budget: budget of the tower.
            size: height and width in pixels.
        """
        return TracedImage.of(self.tower, budget, size, self.central_square)

    def visual_tokens(self, steps: Sequence[Step], image: TracedImage) -> tuple[int, int]:
        """Count the visual tokens of an image that enter the decoder, and those in its last layer.

        Args:
            steps: trace of the image; empty if no token was removed.
            image: the image.
        """
        entering, last = sum(image.num_patches) + image.num_extra, None
        for step in steps:
            if step.site != "decoder":
                entering = len(step.kept) + image.num_extra
            last = len(step.kept) if step.site == "decoder" else entering
        return entering, entering if last is None else last

    def check_complete(self, steps: Sequence[Step], image: TracedImage, keep: int | None) -> None:
        """Check that a trace covers all reductions of its request.

        Args:
            steps: trace of an image.
            image: the image.
            keep: budget of the image in the decoder; None where that does not reduce.

        Raises:
            ValueError: a part is missing.
        """
        entering, last = self.visual_tokens(steps, image)
        expected = image.num_entering
        if keep is not None:
            expected = min(keep, expected)
        if (entering, last) != (image.num_entering, expected):
            raise ValueError(
                f"the trace is incomplete: it ends with {last} visual tokens, the plan has {expected}"
            )

    def kv_bytes(self, num_prompt_tokens: int, steps: Sequence[Step], image: TracedImage) -> int:
        """KV cache of a prompt with one image, over all layers.

        Args:
            num_prompt_tokens: tokens that enter the decoder.
            steps: trace of the image; a token removed in a layer still has its entry there, and none in later layers.
            image: the image.
        """
        entering, _ = self.visual_tokens(steps, image)
        num_tokens = self.num_layers * num_prompt_tokens
        before = entering
        for step in steps:
            if step.site == "decoder":
                num_tokens -= (before - len(step.kept)) * (self.num_layers - 1 - step.layer)
                before = len(step.kept)
        return num_tokens * self.token_bytes


def default_keep(plan: ServerPlan) -> int | None:
    """The budget of a request that names none, or None where it follows the size of each image.

    Args:
        plan: plan of the server.
    """
    if plan.decoder is None:
        return plan.tower.default.keep if plan.tower.default.ratio is None else None
    # With --ficoco-elastic, `keep` is set: its floor.
    if plan.tower.shape.tiling is not None and plan.config.keep is None:
        return None
    return plan.decoder.keep


def choice(method: Method | Pipeline, site: Site) -> MethodChoice:
    """A method as the viewer offers it.

    Args:
        method: one of a registry.
        site: where it reduces last.
    """
    summary = method.summary or _SUMMARIES[site]
    return MethodChoice(name=method.name, title=method.title, site=site, summary=summary)


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
