"""Base of the model classes that replace vLLM's."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
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
from ficoco_vllm.planning.tiles import Layout
from ficoco_vllm.planning.tiling import Crop, Place
from ficoco_vllm.planning.tower import Budget, VisionPlan, VisionPlanner
from ficoco_vllm.request_fields import KEEP, KEEP_RATIO, METHOD, QUESTION, TRACE
from ficoco_vllm.tracing.store import Traces
from ficoco_vllm.vision.packing import Kept, pack
from ficoco_vllm.vision.relevance import Relevance, Source
from ficoco_vllm.vision.staging import take_items
from ficoco_vllm.vision.text_encoder import ClipText
from ficoco_vllm.vision.tiles import keep_tiles
from ficoco_vllm.vision.tower import Observers, Tokens, Tower, encode, run_whole


class Requested(NamedTuple):
    """Fields of the images of a step, read from vLLM's batch.

    Attributes:
        budgets: budget of each image.
        traced: image to trace id, for the images that are traced.
        questions: tokens (M,) of the question about each image, where a method reads it.
    """

    budgets: Sequence[Budget]
    traced: Mapping[int, int]
    questions: Sequence[Tensor] = ()

    def about(self, images: Iterable[int]) -> list[Tensor]:
        """Questions about some images; none where no method reads them."""
        return [self.questions[image] for image in images] if len(self.questions) else []


class ReducingModel(nn.Module):
    """Mixin for a model class of vLLM's: reduces in tower and decoder.

    A family implements `tower_of` and `embed_multimodal`; `project` and `stock_units` where the defaults do not fit.

    Attributes:
        planner: planner of the tower, None unless a method works there.
        decoder: view of the language model, None unless a method works there.
        stopwatch: times the reductions in the tower.
        traces: store of the requested traces.
        max_images: images, or tiles, that the tower encodes in one batch.
        source: source of the vectors by which units are compared with a question.
        tower_of: returns the model's tower as `encode` runs it, for images whose grids have these rows and columns of
            units.
    """

    config: Any
    language_model: Any
    multi_modal_projector: Any
    tower_of: Callable[[tuple[int, int]], Tower]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.planner: VisionPlanner | None = None
        self.decoder: SegmentedDecoder | None = None
        self.stopwatch: Stopwatch | None = None
        self.traces = Traces()
        self.source: Source = _Embeddings(self)
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
            at_once = vllm_config.scheduler_config.max_num_batched_tokens // shape.num_units
            if plan.config.text_encoder is not None:
                model = vllm_config.model_config
                self.source = ClipText(plan.config.text_encoder, model.dtype, current_platform.device_type)
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
            positions: (tokens,); (3, tokens) for M-RoPE.
            intermediate_tensors: None, since a decoder that reduces has no pipeline stages.
            inputs_embeds: (tokens, hidden size).
            reduction: set in the steps that reduce a prompt in the decoder.
            **kwargs: arguments of vLLM's class.
        """
        if reduction is None:
            profiling = is_forward_context_available() and get_forward_context().attn_metadata is None
            if self.decoder is not None and profiling and inputs_embeds is not None:
                self.decoder.warm_up(positions, inputs_embeds, self.deepstack(len(inputs_embeds)))
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        assert self.decoder is not None
        assert inputs_embeds is not None
        return self.decoder(positions, inputs_embeds, reduction, self.deepstack(len(inputs_embeds)))

    def deepstack(self, num_tokens: int) -> Sequence[Tensor]:
        """Features of a step that the language model adds to the outputs of its first layers, one for each.

        Args:
            num_tokens: number of tokens of the step.

        Returns:
            (num_tokens, hidden size) tensors; none where the model has no deepstack.
        """
        return ()

    @property
    def newline(self) -> Tensor | None:
        """Embedding of the end of a row of tiles, (hidden size,); None where the model has none."""
        return None

    def project(self, units: Tensor) -> Tensor:
        """Tokens of the language model, (B, K, hidden size), from units (B, K, unit * D)."""
        projected: Tensor = self.multi_modal_projector(units)
        return projected

    def embed_units(self, units: Tensor) -> Tensor:
        """Embeddings of units that are compared with those of a question, (B, N, hidden size).

        Args:
            units: (B, N, unit * D), output of the tower.
        """
        return self.project(units)

    def stock_units(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Units of tiles from which nothing leaves, (B, U, unit * D).

        Args:
            pixels: pixels of B tiles.
            grid: rows and columns of units.
        """
        tower = self.tower_of(grid)
        return run_whole(tower, pixels).split(tower.unit)[1]

    def requested(self, fields: dict[str, object]) -> Requested | None:
        """Take our fields from vLLM's batch; None where the tower does not reduce.

        Args:
            fields: of a batch of n images, with `ficoco_keep` and `ficoco_method` (n,) on the host, `ficoco_keep_ratio`
                (n,) where budgets are shares, `ficoco_trace` (n,) where images are traced, and `ficoco_question` where
                a method reads it, (n, M) or n tensors (M,) on the device.
        """
        keep, ratio, method, trace = (fields.pop(name, None) for name in (KEEP, KEEP_RATIO, METHOD, TRACE))
        questions: Any = fields.pop(QUESTION, ())
        if self.planner is None or not isinstance(keep, Tensor):
            return None
        assert isinstance(method, Tensor)
        ratios = ratio.tolist() if isinstance(ratio, Tensor) else [None] * len(keep)
        budgets = [
            Budget(self.planner.methods[number], count, share)
            for number, count, share in zip(method.tolist(), keep.tolist(), ratios, strict=True)
        ]
        traced = dict(enumerate(trace.tolist())) if isinstance(trace, Tensor) else {}
        return Requested(budgets, traced, questions)

    def embed_whole(
        self, pixels: Tensor, requested: Requested, stock: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Embed images that the tower sees whole, those of one budget together.

        Args:
            pixels: (n, 3, height, width).
            requested: fields of the n images.
            stock: units of images that are not reduced, in vLLM's own code.

        Returns:
            One tensor (num_tokens, hidden size) for each image, in order.
        """
        groups: dict[Budget, list[int]] = defaultdict(list)
        for index, budget in enumerate(requested.budgets):
            groups[budget].append(index)
        embeddings: list[Tensor] = [pixels.new_empty(0)] * len(pixels)
        for budget, members in groups.items():
            for start in range(0, len(members), self.max_images):
                chunk = members[start : start + self.max_images]
                batch = pixels if len(chunk) == len(pixels) else take_items(pixels, chunk)
                for index, embedding in zip(
                    chunk, self._embed(batch, budget, requested, chunk, stock), strict=True
                ):
                    embeddings[index] = embedding
        return embeddings

    def _embed(
        self,
        pixels: Tensor,
        budget: Budget,
        requested: Requested,
        chunk: Sequence[int],
        stock: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Tokens of images of one budget, (B, num_tokens, hidden size)."""
        assert self.planner is not None
        shape = self.planner.shape
        if not self.planner.reduces(budget):
            return self.project(stock(pixels))
        traced = requested.traced
        observers = self._observers(
            {place: traced[index] for place, index in enumerate(chunk) if index in traced}
        )
        tokens = self._encode(
            pixels, self.planner.plan(budget), shape.grid, observers, requested.about(chunk)
        )
        return self.project(tokens.hidden if shape.with_cls else tokens.split(shape.unit)[1])

    def embed_tiles(
        self,
        pixels: Any,
        places: Sequence[tuple[Place, ...]],
        requested: Requested,
        stock: Callable[[list[int]], Sequence[Tensor]],
    ) -> list[Tensor]:
        """Embed images in tiles, tiles of one budget and crop together.

        Args:
            pixels: (n, tiles, ...), or as many tensors, of different numbers of tiles.
            places: places of the tiles of each image.
            requested: fields of the n images.
            stock: embeddings of the images of these indices, in vLLM's own code.

        Returns:
            One tensor (num_tokens, hidden size) for each image, in order.
        """
        assert self.planner is not None
        planner = self.planner
        layouts = [
            planner.layout_of(budget, of_image)
            for budget, of_image in zip(requested.budgets, places, strict=True)
        ]
        embeddings: list[Tensor] = [torch.empty(0)] * len(layouts)
        whole = [index for index, layout in enumerate(layouts) if not layout.reduces]
        if whole:
            for index, embedding in zip(whole, stock(whole), strict=True):
                embeddings[index] = embedding
        for index, kept in self._keep(pixels, layouts, requested).items():
            embeddings[index] = pack(layouts[index], kept, self.newline, planner.shape.grid[0])
        return embeddings

    def _keep(self, pixels: Any, layouts: Sequence[Layout], requested: Requested) -> dict[int, list[Kept]]:
        """Run all tiles of the images that are reduced; see `keep_tiles`."""
        assert self.planner is not None
        traced = requested.traced

        def run(
            batch: Tensor,
            plan: VisionPlan,
            grid: tuple[int, int],
            crop: Crop | None,
            tiles: Sequence[tuple[int, int]],
        ) -> Tokens:
            observers = self._observers(
                {place: traced[image] for place, (image, _) in enumerate(tiles) if image in traced},
                {place: number for place, (_, number) in enumerate(tiles)},
            )
            questions = requested.about(image for image, _ in tiles)
            return self._encode(batch, plan, grid, observers, questions, crop)

        return keep_tiles(
            pixels,
            layouts,
            requested.budgets,
            self.planner,
            most=self.max_images,
            whole=self.stock_units,
            encode=run,
            project=self.project,
        )

    def _encode(
        self,
        pixels: Tensor,
        plan: VisionPlan,
        grid: tuple[int, int],
        observers: Observers | None,
        questions: Sequence[Tensor],
        crop: Crop | None = None,
        tower: Tower | None = None,
    ) -> Tokens:
        """Run the tower over images, or tiles, that follow one plan.

        Args:
            pixels: pixels of B images.
            plan: plan of all of them.
            grid: rows and columns of their units.
            observers: the observer of each reduction, if an image is traced.
            questions: about each image, or about that of each tile; read where the method compares them.
            crop: of tiles with padding, the units that show the image.
            tower: the one of this grid, if the caller needs it afterwards.
        """
        # vLLM's dummy images, which it profiles before it allocates the KV cache, are not timed.
        stopwatch = self.stopwatch if self._has_kv_cache() else None
        lap = None if stopwatch is None else stopwatch.lap(plan.reducer.method.name, pixels.device)
        reads = "text_relevance" in plan.reducer.signals
        relevance = Relevance(self.source, questions) if reads else None
        tokens = encode(tower or self.tower_of(grid), pixels, plan, grid, lap, observers, crop, relevance)
        if stopwatch is not None and lap is not None:
            stopwatch.hand_in(lap)
        return tokens

    def _observers(self, traced: dict[int, int], tiles: dict[int, int] | None = None) -> Observers | None:
        """The observers of the images, or tiles, of a batch; None if none is traced. See `Traces.observer`."""
        return partial(self.traces.observer, traced=traced, tiles=tiles) if traced else None

    def _has_kv_cache(self) -> bool:
        layers = self.language_model.model.layers
        return any(_numel(layer.self_attn.attn.kv_cache) for layer in layers if hasattr(layer, "self_attn"))


class _Embeddings:
    """The language model's own embeddings, of the question and of the units."""

    def __init__(self, model: ReducingModel) -> None:
        self._model = model

    def read(self, tokens: Tensor) -> Tensor:
        """See `Source`."""
        embedded: Tensor = self._model.language_model.embed_input_ids(tokens)
        return embedded

    def show(self, units: Tensor) -> Tensor:
        """See `Source`."""
        return self._model.embed_units(units)


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
