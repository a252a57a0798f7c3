"""What one request saves by its plan: visual tokens, KV cache, prefill FLOPs. Host arithmetic only."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.metrics.families import OFF, TEXT
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.planning.tiles import served_tiles
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.reduction.cost import (
    ModelShape,
    TiledPlan,
    TokenPlan,
    estimate,
    estimate_tiles,
    model_shape,
    unreduced,
)
from ficoco_vllm.reduction.pipeline import PIPELINES


@dataclass(frozen=True)
class Account:
    """One prompt with and without reduction.

    Attributes:
        method: label: name of the method, of both joined by "+", of the pair that the server runs, or "off" where
            nothing leaves, "text" where there is no image.
        visual_tokens_in: patches of all images.
        visual_tokens_kept: what is left of them in the end.
        budgets: visual tokens that each image may keep.
        missing: for each segment of decoder layers, prompt tokens without a slot in its KV cache.
        flops_avoided: of the prefill.
    """

    method: str
    visual_tokens_in: int = 0
    visual_tokens_kept: int = 0
    budgets: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    flops_avoided: int = 0


@dataclass(frozen=True)
class Accountant:
    """Accounts of the requests of one server.

    Attributes:
        config: the server's settings.
        hf_config: transformers' configuration of the model.
        tower: plans of the tower.
        decoder: plans of the decoder, if the method works there.
    """

    config: FicocoConfig
    hf_config: Any
    tower: VisionPlanner
    decoder: DecoderPlanner | None

    def account(
        self,
        num_prompt_tokens: int,
        images: Sequence[tuple[int, int]],
        budget: Budget | None,
        extra_args: Mapping[str, Any] | None,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> Account:
        """What a request that was admitted saves.

        Args:
            num_prompt_tokens: of the prompt as it goes to the engine.
            images: offset and number of tokens of each image in it.
            budget: by which the tower reduces them, or None for images that it does not see (embeddings).
            extra_args: the request's `vllm_xargs`.
            sizes: height and width in pixels of each image that the tower sees.
        """
        if not images:
            return Account(TEXT)
        entering = [length - self.tower.shape.with_cls for _, length in images]
        before = entering
        if budget is not None and self.tower.shape.tiling is None:
            before = [self.tower.shape.num_patches] * len(images)
        elif budget is not None:
            before = [self.tower.num_before(height=height, width=width) for height, width in sizes]
        counts: tuple[tuple[int, ...], ...] = (tuple(entering),)
        by_tower = budget.method if budget is not None and entering != before else None
        by_decoder = None
        if self.decoder is not None:
            plan = self.decoder.plan(num_prompt_tokens, images, extra_args)
            counts = plan.counts
            by_decoder = plan.method if plan.reduces else None
        flops_avoided = 0
        num_text_tokens = num_prompt_tokens - sum(length for _, length in images)
        if budget is not None and (by_tower or by_decoder) and self.tower.shape.tiling is not None:
            flops_avoided = self._flops_of_tiles(budget, counts, sizes, num_text_tokens)
        elif budget is not None and (by_tower or by_decoder):
            per_image = tuple(segment[0] for segment in counts)
            flops_avoided = self.flops_avoided(budget, per_image, len(images), num_text_tokens)
        return Account(
            method=self._label(by_tower, by_decoder),
            visual_tokens_in=sum(before),
            visual_tokens_kept=sum(counts[-1]),
            budgets=counts[-1],
            missing=tuple(sum(before) - sum(segment) for segment in counts),
            flops_avoided=flops_avoided,
        )

    def flops_avoided(
        self, budget: Budget, counts: tuple[int, ...], num_images: int, num_text_tokens: int
    ) -> int:
        """FLOPs of the prefill without reduction minus those with it.

        Args:
            budget: of the tower.
            counts: visual tokens of an image in each segment of the decoder.
            num_images: each reduced alone and alike.
            num_text_tokens: M.

        Returns:
            The difference, 0 for a model or a plan that the cost model does not know.

        Source: arXiv:2411.17686, Eqs. 16-19.
        """
        if self.shape is None or num_text_tokens < 1:
            return 0
        try:
            value, first, second = _differences(self.shape, self.token_plan(budget, counts), num_images)
        except ValueError:  # a request is answered whether it can be counted or not
            return 0
        steps = num_text_tokens - 1
        return value + steps * first + steps * (steps - 1) // 2 * second

    def _flops_of_tiles(
        self,
        budget: Budget,
        counts: tuple[tuple[int, ...], ...],
        sizes: Sequence[tuple[int, int]],
        num_text_tokens: int,
    ) -> int:
        """As `flops_avoided`, of images in tiles.

        Args:
            budget: of the tower.
            counts: visual tokens of each image in each segment of the decoder.
            sizes: height and width of each image.
            num_text_tokens: M.
        """
        if self.shape is None or num_text_tokens < 1:
            return 0
        size = self.shape.decoder.num_layers // len(counts)
        decoder = [sum(counts[layer // size]) for layer in range(self.shape.decoder.num_layers)]
        plan = served_tiles(self.tower, budget, tuple(sizes), (*decoder, decoder[-1]))
        before = sum(self.tower.num_before(height=height, width=width) for height, width in sizes)
        whole = Budget(None, self.tower.most_keep)
        stock = served_tiles(self.tower, whole, tuple(sizes), (before,) * (len(decoder) + 1))
        value, first, second = _tiled_differences(self.shape, stock, plan)
        steps = num_text_tokens - 1
        return value + steps * first + steps * (steps - 1) // 2 * second

    @cached_property
    def shape(self) -> ModelShape | None:
        """Sizes of the model, None where the cost model does not know its like."""
        try:
            return model_shape(self.hf_config.to_dict())
        except ValueError:
            return None

    def token_plan(self, budget: Budget, counts: tuple[int, ...]) -> TokenPlan:
        """The layers of a served plan, as the cost model counts them.

        Args:
            budget: of the tower.
            counts: visual tokens of an image in each segment of the decoder.
        """
        assert self.shape is not None
        encoder = [self.tower.shape.num_patches]
        plan = self.tower.plan(budget) if self.tower.reduces(budget) else None
        for layer in range(self.tower.shape.num_executed_layers):
            removed = plan.removals.get(layer, 0) if plan else 0
            encoder.append(encoder[-1] - removed + (plan.reducer.num_extra if plan and removed else 0))
        num_layers = self.shape.decoder.num_layers
        size = num_layers // len(counts)
        decoder = [counts[layer // size] for layer in range(num_layers)]
        return TokenPlan(tuple(encoder), (*decoder, decoder[-1]))

    def _label(self, by_tower: str | None, by_decoder: str | None) -> str:
        pipeline = PIPELINES.get(self.config.method or "")
        if pipeline and (by_tower, by_decoder) == (pipeline.encoder.name, pipeline.decoder.name):
            return pipeline.name
        return "+".join(name for name in (by_tower, by_decoder) if name is not None) or OFF


@lru_cache(maxsize=1024)
def _differences(shape: ModelShape, plan: TokenPlan, num_images: int) -> tuple[int, int, int]:
    """Newton's forward differences at M = 1 of what a plan avoids.

    FLOPs are a polynomial of degree 2 in M, the number of text tokens, so three values give it for all.
    """
    stock = unreduced(shape)
    return _newton(
        estimate(shape, stock, num_text_tokens=M, num_images=num_images).total_flops
        - estimate(shape, plan, num_text_tokens=M, num_images=num_images).total_flops
        for M in (1, 2, 3)
    )


@lru_cache(maxsize=1024)
def _tiled_differences(shape: ModelShape, stock: TiledPlan, plan: TiledPlan) -> tuple[int, int, int]:
    """As `_differences`, of images in tiles."""
    return _newton(
        estimate_tiles(shape, stock, num_text_tokens=M).total_flops
        - estimate_tiles(shape, plan, num_text_tokens=M).total_flops
        for M in (1, 2, 3)
    )


def _newton(values: Iterable[int]) -> tuple[int, int, int]:
    at_1, at_2, at_3 = values
    return at_1, at_2 - at_1, at_3 - 2 * at_2 + at_1
