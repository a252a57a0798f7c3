"""From a method, a budget and a schedule to the tokens of every layer."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import floor
from statistics import fmean

from ficoco_vllm.reduction.cost.budget import PLAIN, Budget, Traits, spread, spread_pairs
from ficoco_vllm.reduction.cost.shapes import ModelShape
from ficoco_vllm.reduction.cost.tiles import TiledPlan, TilePlan
from ficoco_vllm.reduction.cost.tokens import TokenPlan, constant
from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.pipeline import PIPELINES, Pipeline
from ficoco_vllm.reduction.registry import available, get
from ficoco_vllm.reduction.schedule import default_start_layer

# The paper's "4-th layer of the LLM", counted from 0.
DECODER_START_LAYER = 3


def plan_tokens(
    shape: ModelShape, method: str, budget: Budget, encoder_budget: Budget | None = None
) -> TokenPlan:
    """Count the visual tokens of every layer under a method.

    Args:
        shape: the model.
        method: name of a registered method, or "ficoco-vl".
        budget: of the method; for a method that reduces at both sites, of its decoder part.
        encoder_budget: for such a method only, of its tower part. Without `keep`, what `Pipeline.encoder_keep`
            says.

    Returns:
        The plan.

    Raises:
        ValueError: a setting is unknown, missing, out of range, or cannot be met with this method.

    Source: arXiv:2411.17686, Sections 3 and 10.
    """
    num_patches = shape.tower.num_patches
    full_tower = (num_patches,) * (shape.tower.num_executed + 1)
    if method in PIPELINES:
        pipeline = PIPELINES[method]
        tower_budget = _tower_part(pipeline, num_patches, budget, encoder_budget or Budget())
        encoder = encoder_tokens(shape, tower_budget, _own(pipeline.encoder))
        return TokenPlan(encoder, decoder_tokens(shape, encoder[-1], budget, _own(pipeline.decoder)))
    if encoder_budget is not None:
        raise ValueError(
            f"encoder_keep, encoder_schedule, encoder_start_layer: allowed for {', '.join(PIPELINES)}"
        )
    if method not in available():
        raise ValueError(f"method: got {method!r}, allowed: {', '.join(sorted({*available(), *PIPELINES}))}")
    chosen = get(method)
    if chosen.site == "decoder":
        return TokenPlan(full_tower, decoder_tokens(shape, num_patches, budget, _own(chosen)))
    if chosen.site == "encoder":
        encoder = encoder_tokens(shape, budget, _own(chosen))
        return TokenPlan(encoder, (encoder[-1],) * (shape.decoder.num_layers + 1))
    return constant(shape, _feature_tokens(num_patches, budget, _own(chosen)))


def plan_tiles(
    shape: ModelShape,
    method: str,
    budget: Budget,
    encoder_budget: Budget | None,
    tiles: Sequence[int],
    newlines: tuple[int, int],
) -> TiledPlan:
    """Count the tokens of an image in tiles under a method.

    Args:
        shape: the model.
        method: name of a registered method, or "ficoco-vl".
        budget: of each tile for a method of the tower, of the image for one of the decoder.
        encoder_budget: see `plan_tokens`; of each tile.
        tiles: patches of each tile that show the image, at least one.
        newlines: without a reduction in the tower and with one.

    Returns:
        The plan. A tile that has no more patches than its budget keeps them.

    Raises:
        ValueError: as `plan_tokens`.
    """
    N = shape.tower.num_patches
    pipeline = PIPELINES.get(method)
    tower, decoder_method = (pipeline.encoder, pipeline.decoder) if pipeline else (get(method), get(method))
    by_decoder = decoder_method.site == "decoder"
    keep, tile_budget = N, budget
    if pipeline is not None:
        final = budget if budget.keep is None else replace(budget, keep=min(budget.keep, N))
        tile_budget = _tower_part(pipeline, N, final, encoder_budget or Budget())
        keep = encoder_tokens(shape, tile_budget, _own(tower))[-1]
    elif not by_decoder:
        keep = plan_tokens(shape, method, budget, encoder_budget).decoder[
            0
        ]  # refuses what a whole tile cannot meet
    num_layers = shape.decoder.num_layers
    planned = []
    for size in tiles:
        counts = (size,) * (shape.tower.num_executed + 1)
        if keep < size and tower.site == "encoder":
            counts = encoder_tokens(shape, replace(tile_budget, keep=keep, kv_budget=None), _own(tower), size)
        planned.append(TilePlan.of(N, counts, min(keep, size)))
    kept = sum(tile.kept for tile in planned)
    reduces = keep < N
    entering = kept + newlines[reduces]
    decoder = (entering,) * (num_layers + 1)
    if by_decoder:
        decoder = decoder_tokens(shape, entering, budget, _own(decoder_method))
    # Stock vLLM crops the padding behind the projector.
    return TiledPlan(tuple(planned), kept if reduces else N * len(tiles), decoder)


def encoder_tokens(
    shape: ModelShape, budget: Budget, traits: Traits = PLAIN, entering: int | None = None
) -> tuple[int, ...]:
    """Patch tokens that enter each executed layer of the tower, and those that leave it.

    Args:
        shape: the model.
        budget: without a start layer, and if the method has none, the paper's 12th layer of 24 starts, scaled
            with the depth.
        traits: of the method.
        entering: patches of a tile that show the image, if not all do.

    Returns:
        One count for each executed layer and one for the exit, [CLS] not counted.

    Raises:
        ValueError: a setting is missing, out of range, or cannot be met by this method.

    Source: arXiv:2411.17686, Section 10.
    """
    entering, num_layers = entering or shape.tower.num_patches, shape.tower.num_executed
    keep = _constant_keep(budget)
    if budget.pairs is not None:
        return spread_pairs(entering, num_layers, budget.pairs, keep, traits)
    return spread(entering, num_layers, keep, budget, default_start_layer(shape.tower.num_layers), traits)


def decoder_tokens(
    shape: ModelShape, entering: int, budget: Budget, traits: Traits = PLAIN
) -> tuple[int, ...]:
    """Visual tokens that enter each decoder layer, and those that leave it.

    Args:
        shape: the model.
        entering: visual tokens of an image that leave the tower.
        budget: without a start layer, and if the method has none, the paper's 4th layer starts. A `kv_budget`
            is met from below, by the largest `keep` whose average does not exceed it.
        traits: of the method.

    Returns:
        One count for each layer and one for the exit.

    Raises:
        ValueError: a setting is missing, out of range, or cannot be met by this method.

    Source: arXiv:2411.17686, Section 10.
    """
    num_layers = shape.decoder.num_layers
    if budget.kv_budget is not None and (budget.keep is not None or budget.pairs is not None):
        raise ValueError("kv_budget: allowed without keep, and with a named schedule only")
    if budget.pairs is not None:
        return spread_pairs(entering, num_layers, budget.pairs, budget.keep, traits)

    def counts(keep: int | None) -> tuple[int, ...]:
        return spread(entering, num_layers, keep, budget, DECODER_START_LAYER, traits)

    if budget.kv_budget is None:
        return counts(budget.keep)
    return _within(budget.kv_budget, entering, counts)


def _within(kv_budget: float, entering: int, counts: Callable[[int], tuple[int, ...]]) -> tuple[int, ...]:
    def mean(keep: int) -> float:
        return fmean(counts(keep)[:-1])

    if not mean(1) <= kv_budget <= entering:
        raise ValueError(f"kv_budget: got {kv_budget}, allowed: {mean(1):.2f} (keep = 1) to {entering}")
    return counts(bisect_right(range(1, entering + 1), kv_budget, key=mean))


def _feature_tokens(num_patches: int, budget: Budget, traits: Traits) -> int:
    # All go in one call behind the last executed layer: there is no layer to choose.
    if budget.schedule is not None or budget.start_layer is not None:
        raise ValueError("schedule, start_layer: allowed for methods that reduce inside tower or decoder")
    at_once = Budget(schedule="one-shot", start_layer=0)
    return spread(num_patches, 1, _constant_keep(budget), at_once, 0, traits)[-1]


def _constant_keep(budget: Budget) -> int | None:
    # What leaves the tower is in every decoder layer, so that keep and KV budget are the same number.
    if budget.kv_budget is None:
        return budget.keep
    if budget.keep is not None:
        raise ValueError("kv_budget: allowed without keep only")
    return floor(budget.kv_budget)


def _tower_part(pipeline: Pipeline, num_patches: int, budget: Budget, encoder_budget: Budget) -> Budget:
    if encoder_budget.keep is not None or encoder_budget.pairs is not None:
        return encoder_budget
    # What the decoder part ends at; where that is out of range, its own check names the option.
    if budget.pairs:
        final = min(max(budget.pairs[-1][1], 1), num_patches)
    elif budget.kv_budget is not None:
        final = min(floor(budget.kv_budget), num_patches)
    else:
        final = budget.keep if budget.keep is not None else num_patches
    return replace(encoder_budget, keep=pipeline.encoder_keep(num_patches, final))


def _own(method: Method) -> Traits:
    defaults = {name: field.default for name, field in method.settings.model_fields.items()}
    return Traits(
        num_extra=method.num_extra,
        max_removed=method.max_removed,
        schedule=method.default_schedule,
        start_layer=defaults.get("start_layer"),
        layers=defaults.get("layers"),
    )
