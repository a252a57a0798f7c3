"""Base of the LLaVA classes that replace vLLM's."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.platforms import current_platform

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.decoder.decoder import ReducingStep, SegmentedDecoder
from ficoco_vllm.hooks.segment_cache import hook_kv_cache_specs
from ficoco_vllm.metrics.families import metrics
from ficoco_vllm.metrics.stopwatch import Stopwatch
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tiling import Crop
from ficoco_vllm.planning.tower import VisionPlan, VisionPlanner
from ficoco_vllm.tracing.store import Traces
from ficoco_vllm.vision.tower import Observers, Tokens, encode
from ficoco_vllm.vision.vllm_tower import VllmTower


class ReducingLlava(nn.Module):
    """Mixin for a LLaVA class of vLLM's: reduces in tower and decoder.

    Attributes:
        planner: of the tower, None unless a method works there.
        decoder: view of the language model, None unless a method works there.
        stopwatch: times the reductions in the tower.
        traces: of the requests that are traced.
        max_images: images, or tiles, that the tower encodes in one batch.
    """

    config: Any
    language_model: Any
    vision_tower: Any
    multi_modal_projector: Any
    _image_pixels_to_features: Callable[[Any, Tensor], Tensor]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.planner: VisionPlanner | None = None
        self.decoder: SegmentedDecoder | None = None
        self.stopwatch: Stopwatch | None = None
        self.traces = Traces()
        if FicocoConfig.of(self.config).method is None:
            return
        plan = ServerPlan.served(self.config)
        shape = plan.tower.shape
        if plan.decoder is not None:
            # These import Triton, which model runner V1 does not need.
            from ficoco_vllm.decoder.state import DecoderModelState
            from ficoco_vllm.hooks.kernels import hook_kernels

            hook_kernels()
            hook_kv_cache_specs(self.language_model.model, plan.decoder.segments)
            if vllm_config.speculative_config is not None and current_platform.is_cpu():
                from ficoco_vllm.hooks.drafts import hook_drafts  # imports Triton, too

                hook_drafts()
            self.decoder = SegmentedDecoder(
                self.language_model.model,
                plan.decoder,
                shape.grid,
                compiled=vllm_config.compilation_config.mode != CompilationMode.NONE,
                stopwatch=_stopwatch(vllm_config, plan.decoder.method, "decoder"),
                traces=self.traces,
            )
            # vLLM looks for this name; without a method in the decoder it must not find it.
            self.get_model_state_cls = lambda: DecoderModelState
        if plan.tower.active:
            self.planner = plan.tower
            self.stopwatch = _stopwatch(vllm_config, str(plan.tower.default.method), "tower")
            # As many at a time as in stock vLLM, so that many small budgets need no more memory.
            at_once = vllm_config.scheduler_config.max_num_batched_tokens // shape.num_patches
            self.max_images = max(1 if shape.tiling is None else shape.tiling.most_tiles, at_once)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        reduction: ReducingStep | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the language model; see vLLM's class.

        Args:
            input_ids: (tokens,) or None.
            positions: (tokens,).
            intermediate_tensors: None, since a decoder that reduces has no pipeline stages.
            inputs_embeds: (tokens, hidden size).
            reduction: set in the steps that reduce a prompt in the decoder.
            **kwargs: of vLLM's class.
        """
        if reduction is None:
            profiling = is_forward_context_available() and get_forward_context().attn_metadata is None
            if self.decoder is not None and profiling and inputs_embeds is not None:
                self.decoder.warm_up(positions, inputs_embeds)
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        assert self.decoder is not None
        assert inputs_embeds is not None
        return self.decoder(positions, inputs_embeds, reduction)

    def _encode(
        self, pixels: Tensor, plan: VisionPlan, observers: Observers | None, crop: Crop | None = None
    ) -> Tokens:
        """Run the tower over images, or tiles, that follow one plan.

        Args:
            pixels: (B, 3, height, width).
            plan: of all of them.
            observers: the observer of each reduction, if an image is traced.
            crop: of tiles with padding, the patches that show the image.
        """
        assert self.planner is not None
        # vLLM's dummy images, which it profiles before it allocates the KV cache, are not timed.
        stopwatch = self.stopwatch if self._has_kv_cache() else None
        lap = None if stopwatch is None else stopwatch.lap(plan.reducer.method.name, pixels.device)
        tower, grid = VllmTower(self.vision_tower.vision_model), self.planner.shape.grid
        tokens = encode(tower, pixels, plan, grid, lap, observers, crop)
        if stopwatch is not None and lap is not None:
            stopwatch.hand_in(lap)
        return tokens

    def _observers(self, traced: dict[int, int], tiles: dict[int, int] | None = None) -> Observers | None:
        """The observers of the images, or tiles, of a batch; None if none is traced. See `Traces.observer`."""
        return partial(self.traces.observer, traced=traced, tiles=tiles) if traced else None

    def _has_kv_cache(self) -> bool:
        layers = self.language_model.model.layers
        return any(_numel(layer.self_attn.attn.kv_cache) for layer in layers if hasattr(layer, "self_attn"))


def _numel(kv_cache: Any) -> int:
    return sum(cache.numel() for cache in (kv_cache if isinstance(kv_cache, list | tuple) else [kv_cache]))


def _stopwatch(vllm_config: VllmConfig, method: str, site: str) -> Stopwatch | None:
    """The stopwatch of the reductions at one site, on the first tensor-parallel worker only.

    Args:
        vllm_config: vLLM's configuration.
        method: the server's at this site; a request may bring another.
        site: "tower" or "decoder".
    """
    if (
        not FicocoConfig.of(vllm_config.model_config.hf_config).metrics
        or get_tensor_model_parallel_rank() != 0
    ):
        return None
    family = metrics().reduction_seconds
    engine = str(vllm_config.parallel_config.data_parallel_index)
    model_name = vllm_config.model_config.served_model_name
    family.labels(model_name, engine, method, site)  # zero before the first image, so that rates include it
    return Stopwatch(lambda method, seconds: family.labels(model_name, engine, method, site).observe(seconds))
