"""Savings of one request by its plan: visual tokens, KV cache, prefill FLOPs. Host arithmetic only."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

from ficoco_vllm.metrics.families import OFF, TEXT
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tower import Budget
from ficoco_vllm.planning.windows import read_ends
from ficoco_vllm.reduction.cost import ModelShape, TokenPlan, estimate_prompt, model_shape
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.request_fields import BUDGET, KEEP, METHOD, SAVINGS, SIZES, WINDOW


@dataclass(frozen=True)
class Savings:
    """One prompt with and without reduction.

    Attributes:
        method: label: name of the method, of both joined by "+", of the pair that the server runs, or "off" where
            nothing leaves, "text" where there is no image.
        visual_tokens_in: patches of all images.
        visual_tokens_kept: those that are left after the last reduction.
        budgets: visual tokens that each image may keep.
        missing: for each segment of decoder layers, prompt tokens without a slot in its KV cache.
        flops_avoided: FLOPs that the prefill avoids.
    """

    method: str
    visual_tokens_in: int = 0
    visual_tokens_kept: int = 0
    budgets: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    flops_avoided: int = 0


@dataclass(frozen=True, eq=False)
class SavingsPlanner:
    """Plans the savings of the requests of one server.

    Attributes:
        plan: plan of the server.
        shape: sizes of the model, None where the cost model does not cover it.
    """

    plan: ServerPlan
    shape: ModelShape | None

    @classmethod
    def of(cls, hf_config: Any) -> "SavingsPlanner":
        """The one planner of a server.

        Args:
            hf_config: transformers' configuration of the model; see `ServerPlan.served`.
        """
        try:
            shape = model_shape(hf_config.to_dict())
        except ValueError:
            shape = None
        return _shared(ServerPlan.served(hf_config), shape)

    def of_prompt(
        self, prompt: dict[str, Any], images: Sequence[tuple[int, int]], extra_args: Mapping[str, Any] | None
    ) -> Savings:
        """The savings of a processed prompt, kept with it: the response reports what the metrics count.

        Args:
            prompt: from vLLM's renderer.
            images: see `compute`.
            extra_args: see `compute`.

        Raises:
            ValueError: the decoder cannot serve the request.
        """
        # Ends of windows are added at admission; they change no count.
        decoder = {name: value for name, value in (extra_args or {}).items() if name in (KEEP, METHOD)}
        known: tuple[Any, Savings] | None = prompt.get(SAVINGS)
        if known is None or known[0] != (images, decoder):
            known = (images, decoder), self.compute(*read_prompt(prompt, images, decoder))
            prompt[SAVINGS] = known
        return known[1]

    def compute(
        self,
        num_prompt_tokens: int,
        images: Sequence[tuple[int, int]],
        budget: Budget | None,
        extra_args: Mapping[str, Any] | None,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> Savings:
        """The savings of an admitted request.

        Args:
            num_prompt_tokens: number of tokens of the prompt that goes to the engine.
            images: offset and number of tokens of each image in it.
            budget: by which the tower reduces them, or None for embeddings, which it does not see.
            extra_args: the request's `vllm_xargs`.
            sizes: height and width in pixels of each image that the tower sees.
        """
        if not images:
            return Savings(TEXT)
        tower = self.plan.tower
        entering = [length - tower.shape.with_cls for _, length in images]
        before = entering
        # Only tiles depend on the size of the image.
        places: Sequence[tuple[int, int] | None] = sizes if tower.shape.tiling else [None] * len(images)
        if budget is not None:
            before = [tower.num_before(height=h, width=w) for h, w in (size or (0, 0) for size in places)]
        by_tower = budget.method if budget is not None and entering != before else None
        by_decoder = None
        counts: tuple[tuple[int, ...], ...] = (tuple(entering),)
        if self.plan.decoder is not None:
            plan = self.plan.decoder.plan(num_prompt_tokens, images, extra_args)
            counts = plan.counts
            by_decoder = plan.method if plan.reduces else None
        flops_avoided = 0
        num_text_tokens = num_prompt_tokens - sum(length for _, length in images)
        if self.shape is not None and budget is not None and (by_tower or by_decoder) and num_text_tokens > 0:
            per_image = zip(*counts, strict=True)
            with suppress(ValueError):  # a request that the cost model does not cover is answered anyway
                reduced = [
                    self.plan.image_tokens(budget, *image) for image in zip(per_image, places, strict=True)
                ]
                stock = [self.plan.unreduced(size) for size in places]
                flops_avoided = _flops_avoided(self.shape, tuple(stock), tuple(reduced), num_text_tokens)
        return Savings(
            method=self._label(by_tower, by_decoder),
            visual_tokens_in=sum(before),
            visual_tokens_kept=sum(counts[-1]),
            budgets=counts[-1],
            missing=tuple(sum(before) - sum(segment) for segment in counts),
            flops_avoided=flops_avoided,
        )

    def of_rest(self, num_cached: int, savings: Savings, *request: Any) -> Savings:
        """The savings of what a request computes after tokens that the prefix cache held.

        What another request has computed and saved before is not counted again.

        Args:
            num_cached: tokens of the prompt that the cache held; an image is among them wholly or not at all.
            savings: savings of the whole prompt.
            *request: the arguments of `compute`.
        """
        num_prompt_tokens, images, budget, extra_args, sizes = request
        if self.plan.decoder is None:
            return savings  # the tower's part is cached with the image, not with its tokens
        rest = [index for index, (offset, _) in enumerate(images) if offset >= num_cached]
        extra_args = dict(extra_args or {})
        if WINDOW in extra_args:
            ends = read_ends(extra_args[WINDOW], num_prompt_tokens)
            extra_args[WINDOW] = [end - num_cached for end in ends if end > num_cached]
        computed = self.compute(
            num_prompt_tokens - num_cached,
            [(images[index][0] - num_cached, images[index][1]) for index in rest],
            budget,
            extra_args,
            [sizes[index] for index in rest] if len(sizes) == len(images) else sizes,
        )
        return replace(computed, method=savings.method)

    def _label(self, by_tower: str | None, by_decoder: str | None) -> str:
        pipeline = PIPELINES.get(self.plan.config.method or "")
        if pipeline and (by_tower, by_decoder) == (pipeline.encoder.name, pipeline.decoder.name):
            return pipeline.name
        return "+".join(name for name in (by_tower, by_decoder) if name is not None) or OFF


def read_prompt(
    prompt: Mapping[str, Any], images: Sequence[tuple[int, int]], extra_args: Mapping[str, Any] | None
) -> tuple[Any, ...]:
    """Arguments of `SavingsPlanner.compute` for a processed prompt; see there."""
    num_tokens = len(prompt.get("prompt_token_ids") or ())
    return num_tokens, images, prompt.get(BUDGET), extra_args, prompt.get(SIZES, ())


@cache
def _shared(plan: ServerPlan, shape: ModelShape | None) -> SavingsPlanner:
    return SavingsPlanner(plan, shape)


def _flops_avoided(
    shape: ModelShape, stock: tuple[TokenPlan, ...], reduced: tuple[TokenPlan, ...], num_text_tokens: int
) -> int:
    """FLOPs of the prefill without reduction minus those with it.

    Args:
        shape: sizes of the model.
        stock: plan of each image without reduction.
        reduced: plan of each image.
        num_text_tokens: M.

    Source: arXiv:2411.17686, Eqs. 16-19.
    """
    value, first, second = _differences(shape, stock, reduced)
    steps = num_text_tokens - 1
    return value + steps * first + steps * (steps - 1) // 2 * second


@lru_cache(maxsize=1024)
def _differences(
    shape: ModelShape, stock: tuple[TokenPlan, ...], reduced: tuple[TokenPlan, ...]
) -> tuple[int, int, int]:
    """Newton's forward differences of the avoided FLOPs at M = 1.

    FLOPs are a polynomial of degree 2 in M, the number of text tokens, so that three values determine it.
    """
    at_1, at_2, at_3 = (
        estimate_prompt(shape, Counter(stock), num_text_tokens=M).total_flops
        - estimate_prompt(shape, Counter(reduced), num_text_tokens=M).total_flops
        for M in (1, 2, 3)
    )
    return at_1, at_2 - at_1, at_3 - 2 * at_2 + at_1
