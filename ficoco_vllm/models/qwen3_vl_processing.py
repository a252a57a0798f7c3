"""Processing of Qwen3-VL's images: budgets of grids that follow the image's size, and images that are shrunk instead."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import SizeDict
from vllm.model_executor.models.qwen3_vl import Qwen3VLMultiModalProcessor, Qwen3VLProcessingInfo
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeProcessingInfo
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.parse import MultiModalDataItems

from ficoco_vllm.planning.resolution import Resolution
from ficoco_vllm.planning.tower import Budget
from ficoco_vllm.processing import ReducingInfo, ReducingProcessor, without_ours
from ficoco_vllm.reduction.control import DOWNSCALE
from ficoco_vllm.request_fields import KEEP


class QwenInfo(ReducingInfo, Qwen3VLProcessingInfo):
    """Qwen3-VL's processing info, with the number of tokens that an image keeps."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        """See vLLM's class; without our fields."""
        return super().get_hf_processor(**without_ours(kwargs))

    def _merge_and_resolve_mm_processor_kwargs(self, mm_kwargs: Mapping[str, object]) -> dict[str, Any]:
        return without_ours(super()._merge_and_resolve_mm_processor_kwargs(without_ours(mm_kwargs)))

    def resolution(self, mm_kwargs: Mapping[str, object]) -> Resolution:
        """Resolutions of the images of a request, which may bring its own limits.

        Args:
            mm_kwargs: the request's `mm_processor_kwargs`.
        """
        scoped = self._merge_and_resolve_mm_processor_kwargs(mm_kwargs).get("images_kwargs", {})
        size = self._get_vision_size(scoped, default_size=self.get_image_processor(**mm_kwargs).size)
        vision = self.get_hf_config().vision_config
        unit_size = vision.patch_size * vision.spatial_merge_size
        return Resolution(unit_size, size["shortest_edge"], size["longest_edge"])


class QwenMoeInfo(QwenInfo, Qwen3VLMoeProcessingInfo):
    """The same for the mixtures of experts."""


class QwenProcessor(ReducingProcessor, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's processor, with a budget for each request."""

    info: QwenInfo

    def num_images(self, processed: BatchFeature) -> int:
        """See `ReducingProcessor`."""
        return len(processed["image_grid_thw"])

    def num_tokens(self, budget: Budget, height: int, width: int, item: MultiModalKwargsItem) -> int:
        """See `ReducingProcessor`; by the grid of the processed image, as a request may bring limits of its own."""
        return self._kept(budget, cast(Tensor, item["image_grid_thw"].data))

    def _kept(self, budget: Budget, thw: Tensor) -> int:
        """Units of a processed image that stay; all of one that has been shrunk."""
        side = self.info.get_hf_config().vision_config.spatial_merge_size
        _, rows, columns = (int(length) for length in thw)
        place = Resolution.place(rows // side, columns // side)
        if budget.method == DOWNSCALE.name:
            return place[0].crop.num_units
        return self.info.planner.layout_of(budget, place).num_tokens

    def _postprocess_hf_mm_data(
        self,
        mm_inputs: Mapping[str, object],
        hf_processor_mm_kwargs: Mapping[str, object],
        processed_data: BatchFeature,
    ) -> BatchFeature:
        data = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        if KEEP in data:  # the worker sees grids alone, and neither shares nor shrunk images
            budget = self._admitted(hf_processor_mm_kwargs)
            data[KEEP] = torch.tensor([self._kept(budget, thw) for thw in data["image_grid_thw"]])
        return data

    def _get_hf_mm_inputs(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> Any:
        inputs = super()._get_hf_mm_inputs(mm_items, hf_kwargs)
        budget = self._admitted(hf_kwargs)
        images = inputs.hf_data.get("images")
        if budget.method != DOWNSCALE.name or not images:
            return inputs
        shrunk = [self._shrink(image, budget, hf_kwargs) for image in cast(list[Any], images)]
        # They have whole units, so the model's own processor need not scale them.
        scoped = {
            **cast(Mapping[str, object], inputs.hf_kwargs.get("images_kwargs") or {}),
            "do_resize": False,
        }
        return inputs._replace(
            hf_data={**inputs.hf_data, "images": shrunk},
            hf_kwargs={**inputs.hf_kwargs, "images_kwargs": scoped},
        )

    def _shrink(self, image: Any, budget: Budget, hf_kwargs: Mapping[str, object]) -> Tensor:
        """Scale an image as the model's own processor does, but to the budget: (3, height, width)."""
        processor = self.info.get_image_processor(**hf_kwargs)
        pixels = processor.process_image(image, do_convert_rgb=True)
        height, width = pixels.shape[-2:]
        resolution = self.info.resolution(hf_kwargs)
        rows, columns = resolution.grid(height, width)
        rows, columns = resolution.fit(height, width, budget.of(rows * columns))
        size = SizeDict(height=rows * resolution.unit_size, width=columns * resolution.unit_size)
        scaled: Tensor = TorchvisionBackend.resize(
            processor, pixels[None], size=size, resample=processor.resample
        )
        return scaled[0]
