"""LLaVA with visual tokens reduced in the vision tower or the decoder; takes the place of vLLM's class."""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.llava import (
    BaseLlavaProcessingInfo,
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor, InputProcessingContext

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.decoder.decoder import ReducingStep, SegmentedDecoder
from ficoco_vllm.kv.admission import planner_of
from ficoco_vllm.metrics import metrics
from ficoco_vllm.processing import KEEP, METHOD, FicocoMultiModalProcessor, FicocoProcessingInfo
from ficoco_vllm.stopwatch import Stopwatch
from ficoco_vllm.tracing.store import TRACE, Traces
from ficoco_vllm.vision.plan import Budget, VisionPlanner
from ficoco_vllm.vision.shape import TowerShape
from ficoco_vllm.vision.tower import encode


def _build_info(ctx: InputProcessingContext) -> BaseLlavaProcessingInfo:
    """Ours for the towers that can be reduced, vLLM's for the rest."""
    if isinstance(ctx.get_hf_config().vision_config, CLIPVisionConfig):
        return FicocoProcessingInfo(ctx)
    return _build_llava_or_pixtral_hf_info(ctx)


def _build_processor(
    info: BaseLlavaProcessingInfo, dummy_inputs: LlavaDummyInputsBuilder
) -> BaseMultiModalProcessor:
    if isinstance(info, FicocoProcessingInfo):
        return FicocoMultiModalProcessor(info, dummy_inputs)
    return _build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    _build_processor, info=_build_info, dummy_inputs=LlavaDummyInputsBuilder
)
class FicocoLlava(LlavaForConditionalGeneration):
    """vLLM's LLaVA; images whose budget is below the number of patches take the reducing way."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = FicocoConfig.of(self.config)
        self.planner: VisionPlanner | None = None
        self.decoder: SegmentedDecoder | None = None
        self.watch: Stopwatch | None = None
        self.traces = Traces()
        shape = None if config.method is None else TowerShape.from_hf_config(self.config)
        if shape is not None and config.decoder_method is not None:
            from ficoco_vllm.decoder.state import DecoderModelState  # imports Triton, which V1 does without

            self.decoder = SegmentedDecoder(
                self.language_model.model,
                planner_of(vllm_config),
                shape.grid,
                compiled=vllm_config.compilation_config.mode != CompilationMode.NONE,
                watch=_watch(vllm_config, config.decoder_method.name, "decoder"),
                traces=self.traces,
            )
            # vLLM looks for this name; without a method in the decoder it must not find it.
            self.get_model_state_cls = lambda: DecoderModelState
        if shape is not None and config.tower_part(shape.num_patches).method is not None:
            self.planner = VisionPlanner.shared(config, shape)
            self.watch = _watch(vllm_config, str(self.planner.default.method), "tower")
            num_patches = self.planner.shape.num_patches
            # As many images at once as stock vLLM would take, so that a burst of small budgets needs no more memory.
            self.max_images = max(1, vllm_config.scheduler_config.max_num_batched_tokens // num_patches)

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
            intermediate_tensors: None, since a decoder that reduces is whole on each worker.
            inputs_embeds: (tokens, hidden size).
            reduction: given in the steps that reduce a prompt in the decoder.
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

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Embed the images of a step, those of one budget together.

        Args:
            **kwargs: vLLM's fields of a batch of n images, with `ficoco_keep` and `ficoco_method` (n,) on the host,
                and `ficoco_trace` (n,) where they are traced.

        Returns:
            One tensor (num_tokens, hidden size) for each image, in order.
        """
        keep, method, trace = (kwargs.pop(name, None) for name in (KEEP, METHOD, TRACE))
        pixels = kwargs.get("pixel_values")
        if self.planner is None or not isinstance(keep, Tensor) or not isinstance(pixels, Tensor):
            return super().embed_multimodal(**kwargs)
        assert isinstance(method, Tensor)
        groups: dict[Budget, list[int]] = defaultdict(list)
        for index, (number, count) in enumerate(zip(method.tolist(), keep.tolist(), strict=True)):
            groups[Budget(self.planner.methods[number], count)].append(index)
        traced = dict(enumerate(trace.tolist())) if isinstance(trace, Tensor) else {}
        embeddings: list[Tensor] = [pixels.new_empty(0)] * len(pixels)
        for budget, members in groups.items():
            for start in range(0, len(members), self.max_images):
                chunk = members[start : start + self.max_images]
                batch = (
                    pixels if len(chunk) == len(pixels) else pixels[torch.tensor(chunk, device=pixels.device)]
                )
                here = {place: traced[index] for place, index in enumerate(chunk) if index in traced}
                for index, embedding in zip(chunk, self._embed(batch, budget, here), strict=True):
                    embeddings[index] = embedding
        return embeddings

    def _embed(self, pixels: Tensor, budget: Budget, traced: dict[int, int]) -> Tensor:
        """Features of images of one budget, projected.

        Args:
            pixels: (B, 3, height, width).
            budget: method and number of patch tokens.
            traced: index in the batch to trace, of the images that are traced.

        Returns:
            (B, num_tokens, hidden size of the language model).
        """
        assert self.planner is not None
        if not self.planner.reduces(budget):
            features = self._image_pixels_to_features(self.vision_tower, pixels)
        else:
            tower = self.vision_tower.vision_model
            # Not the made-up images with which vLLM profiles before it allocates the KV cache.
            stopwatch = self.watch if self._has_kv_cache() else None
            lap = None if stopwatch is None else stopwatch.lap(str(budget.method), pixels.device)
            watch = partial(self.traces.observer, traced=traced) if traced else None
            plan, grid = self.planner.plan(budget), self.planner.shape.grid
            features = encode(tower, pixels, plan, grid, lap, watch)
            if stopwatch is not None and lap is not None:
                stopwatch.hand_in(lap)
            if not self.planner.shape.with_cls:
                features = features[:, 1:]
        projected: Tensor = self.multi_modal_projector(features)
        return projected

    def _has_kv_cache(self) -> bool:
        layers = self.language_model.model.layers
        return any(_numel(layer.self_attn.attn.kv_cache) for layer in layers if hasattr(layer, "self_attn"))


def _numel(kv_cache: Any) -> int:
    return sum(cache.numel() for cache in (kv_cache if isinstance(kv_cache, list | tuple) else [kv_cache]))


def _watch(vllm_config: VllmConfig, method: str, site: str) -> Stopwatch | None:
    """What takes the time of the reductions at one site, on the first of several tensor-parallel workers.

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
    family.labels(model_name, engine, method, site)  # at zero before the first image, so that rates see it
    return Stopwatch(lambda method, seconds: family.labels(model_name, engine, method, site).observe(seconds))
