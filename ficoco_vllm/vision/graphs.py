"""CUDA graphs of the tower, captured and replayed by vLLM's encoder graphs.

A layer is twelve launches and a reduction of FiCoCo-V eight more, and a GPU runs the work of a single image faster than
a host launches it. With `cudagraph_mm_encoder` in vLLM's `--compilation-config`, the tower and the projector of each
budget that the server names are captured once for 1, 2, 4 and 8 images; a replay is one launch. All other budgets and
traced images run eagerly, in the same step.

vLLM's manager packs the images of a step by tokens and captures one graph for each token budget. Two features of the
manager support budgets: a *path*, of which an image may take one and leave out the others, is a budget here; and the
tokens that an image takes of a path are counted as one, so that vLLM's budgets are numbers of images. An image that
takes no path is encoded when the manager hands out the results. `capture_axes` does not fit: the images of a packed
batch must agree in them, and a combination that is not captured fails.

Memory: vLLM captures once before it sizes the KV cache, to measure what the graphs take. All share one pool, whose size
is about that of the largest: eight images of the whole tower.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from vllm.model_executor.models.utils import scatter_output_slices
from vllm.v1.worker.encoder_cudagraph_defs import (
    EncoderCudaGraphCaptureInputs,
    EncoderCudaGraphConfig,
    EncoderCudaGraphPathConfig,
    EncoderCudaGraphReplayBuffers,
    EncoderItemSpec,
)

from ficoco_vllm.planning.families import tower_shape
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.request_fields import KEEP, METHOD, TRACE
from ficoco_vllm.vision.staging import take_items

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Images of the largest graph; with more, the arithmetic takes longer than the launches.
MOST_IMAGES = 8
MOST_CONFIGURED = 32
PIXELS = "pixel_values"
WHOLE = "whole"  # path of the tower without a reduction


class TowerGraphs:
    """vLLM's `SupportsEncoderCudaGraph`, for a LLaVA whose tower sees the whole image.

    Not a subclass of it: a protocol has an `__init__` of its own, which comes between those of vLLM's classes.

    Attributes:
        planner: planner of the tower, None unless a method works there.
        config: transformers' configuration of the model.
        stopwatch: times the reductions in the tower.
        embed_budget: embeds images (B, 3, height, width) of one budget, all of which take the same way, as
            (B, num_tokens, hidden size of the language model).
    """

    supports_encoder_cudagraph: ClassVar[Literal[True]] = True
    planner: VisionPlanner | None
    config: Any
    stopwatch: Any
    embed_budget: Callable[[Tensor, Budget], Tensor]
    embed_multimodal: Callable[..., Any]

    @cached_property
    def graph_budgets(self) -> dict[str, Budget]:
        """Captured budgets by the names of their paths: that of the whole tower, the default, those of the settings.

        Raises:
            ValueError: the images of this model have no fixed shape, or a budget of the settings cannot be met.
        """
        try:
            plan = ServerPlan.served(self.config)
        except ValueError as error:
            raise ValueError(f"cudagraph_mm_encoder is not allowed with this model; {error}") from error
        budgets = {WHOLE: Budget(None, plan.tower.most_keep)}
        if self.planner is not None:
            keeps = (plan.tower_keep(keep) for keep in plan.config.graph_budgets)
            for budget in (self.planner.default, *(self.planner.budget(None, keep) for keep in keeps)):
                if not self.planner.reads_question(budget.method):  # questions differ in length
                    budgets[self._path(budget)] = budget
        return budgets

    def get_encoder_cudagraph_config(self) -> EncoderCudaGraphConfig:
        """One path for each captured budget."""
        return EncoderCudaGraphConfig(
            modalities=["image"],
            buffer_keys=[PIXELS],
            out_hidden_size=self.config.text_config.hidden_size,
            paths={path: EncoderCudaGraphPathConfig() for path in self.graph_budgets},
        )

    def get_input_modality(self, mm_kwargs: dict[str, Any]) -> str:
        """LLaVA takes images only."""
        return "image"

    def get_max_frames_per_video(self) -> int:
        """LLaVA takes no videos."""
        return 1

    def get_encoder_cudagraph_budget_range(self, vllm_config: "VllmConfig") -> tuple[int, int]:
        """Fewest and most images of a graph."""
        most = vllm_config.scheduler_config.max_num_batched_tokens // self.graph_budgets[WHOLE].keep
        return 1, max(1, min(MOST_IMAGES, most))

    def get_encoder_cudagraph_item_specs(self, mm_kwargs: dict[str, Any]) -> list[EncoderItemSpec]:
        """Tokens of each image, and the path that it takes, if its budget is captured."""
        whole = self.graph_budgets[WHOLE].keep
        return [
            EncoderItemSpec(whole, count, {} if path is None else {path: 1})
            for path, count in zip(self._paths(mm_kwargs), self._num_tokens(mm_kwargs), strict=True)
        ]

    def select_encoder_cudagraph_items(self, mm_kwargs: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        """Fields of some images.

        Args:
            mm_kwargs: fields of all images.
            indices: indices of the images that are kept.
        """
        if indices == list(range(_count(mm_kwargs))):
            return dict(mm_kwargs)
        return {name: take_items(values, indices) for name, values in mm_kwargs.items()}

    def prepare_encoder_cudagraph_capture_inputs(
        self,
        token_budget: int,
        max_batch_size: int,
        max_frames_per_batch: int,
        device: torch.device,
        dtype: torch.dtype,
        path: str = "default",
        axis_keys: tuple[Hashable, ...] | None = None,
    ) -> EncoderCudaGraphCaptureInputs:
        """Memory that a graph reads its images from.

        Args:
            token_budget: number of images.
            max_batch_size: not used; see vLLM for this and the others.
            max_frames_per_batch: not used.
            device: device of the tower.
            dtype: data type of the tower.
            path: path of a budget.
            axis_keys: not used.

        Raises:
            ValueError: this many images would need the memory of the KV cache; vLLM's option usually counts tokens.
        """
        if token_budget > MOST_CONFIGURED:
            raise ValueError(
                f"encoder_cudagraph_token_budgets: {token_budget} is not allowed; allowed: numbers of images from 1 to "
                f"{MOST_CONFIGURED}"
            )
        side = self.config.vision_config.image_size
        images = torch.zeros((token_budget, 3, side, side), device=device, dtype=dtype)
        return EncoderCudaGraphCaptureInputs({PIXELS: images})

    def prepare_encoder_cudagraph_replay_buffers(
        self,
        mm_kwargs: dict[str, Any],
        max_batch_size: int,
        max_frames_per_batch: int,
        path: str = "default",
    ) -> EncoderCudaGraphReplayBuffers:
        """Images of a batch that take a path.

        Args:
            mm_kwargs: fields of the batch.
            max_batch_size: not used; see vLLM.
            max_frames_per_batch: not used.
            path: path of a budget.
        """
        members = [index for index, taken in enumerate(self._paths(mm_kwargs)) if taken == path]
        return EncoderCudaGraphReplayBuffers(
            {PIXELS: self.select_encoder_cudagraph_items(mm_kwargs, members)[PIXELS]}
        )

    def encoder_cudagraph_forward(self, inputs: dict[str, Tensor], path: str = "default") -> Tensor:
        """Run tower and projector over images of one budget: what a graph captures.

        Args:
            inputs: the images.
            path: path of the budget.

        Returns:
            (images * tokens, hidden size of the language model).
        """
        stopwatch, self.stopwatch = self.stopwatch, None  # an event within a graph holds no time
        try:
            return self.embed_budget(inputs[PIXELS], self.graph_budgets[path]).flatten(0, 1)
        finally:
            self.stopwatch = stopwatch

    def encoder_eager_forward(self, mm_kwargs: dict[str, Any], path: str = "default") -> Tensor:
        """Run the images of one budget without a graph; see `encoder_cudagraph_forward`."""
        given = self.prepare_encoder_cudagraph_replay_buffers(mm_kwargs, 0, 0, path).values[PIXELS]
        assert given is not None
        return self.encoder_cudagraph_forward({PIXELS: given}, path)

    def postprocess_encoder_output(
        self,
        outputs: dict[str, Tensor],
        indices: list[int],
        per_item_out_tokens: list[int],
        dest: dict[int, Tensor] | list[Tensor | None],
        clone: bool = False,
        batch_mm_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Hand out the outputs of the graphs, and encode the images that took none.

        Args:
            outputs: for each path, the tokens of its images in order, then those of padding images.
            indices: indices of the batch's images in the step.
            per_item_out_tokens: number of tokens of all images of the step.
            dest: takes the tokens of each image of the step.
            clone: whether the outputs of graphs are copied, before a replay writes over them.
            batch_mm_kwargs: fields of the batch.
        """
        assert batch_mm_kwargs is not None
        members: dict[str | None, list[int]] = defaultdict(list)
        for place, path in enumerate(self._paths(batch_mm_kwargs)):
            members[path].append(place)
        for path, places in members.items():
            images = [indices[place] for place in places]
            if path is not None:
                scatter_output_slices(outputs[path], images, per_item_out_tokens, dest, clone)
                continue
            embedded = self.embed_multimodal(**self.select_encoder_cudagraph_items(batch_mm_kwargs, places))
            for image, tokens in zip(images, embedded, strict=True):
                dest[image] = tokens

    def _path(self, budget: Budget) -> str:
        """Path of a budget."""
        reduces = self.planner is not None and self.planner.reduces(budget)
        return f"{budget.method} {budget.keep}" if reduces else WHOLE

    def _budgets(self, mm_kwargs: Mapping[str, Any]) -> list[Budget]:
        """Budget of each image."""
        keep, method = mm_kwargs.get(KEEP), mm_kwargs.get(METHOD)
        if self.planner is None or keep is None or method is None:
            return [self.graph_budgets[WHOLE]] * _count(mm_kwargs)
        return [
            Budget(self.planner.methods[number], count)
            for number, count in zip(method.tolist(), keep.tolist(), strict=True)
        ]

    def _paths(self, mm_kwargs: Mapping[str, Any]) -> list[str | None]:
        """Path of each image, None where its budget is not captured, or where reductions are traced."""
        if PIXELS not in mm_kwargs or TRACE in mm_kwargs:  # else these are embeddings
            return [None] * _count(mm_kwargs)
        paths = (self._path(budget) for budget in self._budgets(mm_kwargs))
        return [path if path in self.graph_budgets else None for path in paths]

    def _num_tokens(self, mm_kwargs: Mapping[str, Any]) -> list[int]:
        """Tokens of each image."""
        if PIXELS not in mm_kwargs:
            return [len(embeddings) for embeddings in next(iter(mm_kwargs.values()))]
        with_cls = tower_shape(self.config).with_cls
        return [budget.keep + with_cls for budget in self._budgets(mm_kwargs)]


def _count(mm_kwargs: Mapping[str, Any]) -> int:
    """Number of images of a batch."""
    return len(next(iter(mm_kwargs.values())))
