"""Visual token counts of a request in each decoder segment: integers, the same in every process.

The number of removed tokens is a pure function of prompt and budget; only their choice depends on the data. Scheduler
and workers each compute the plan, so nothing is communicated and nothing waits for the device.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from operator import add
from statistics import fmean
from typing import Any

from ficoco_vllm.config import FicocoConfig, default_keep
from ficoco_vllm.planning.segments import Segments, scaled
from ficoco_vllm.planning.windows import Window, find_windows, read_ends
from ficoco_vllm.reduction import Reducer, available, get
from ficoco_vllm.reduction.method import SITES
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.reduction.schedule import DECODER_START_LAYER, make_schedule
from ficoco_vllm.request_fields import KEEP, METHOD, WINDOW, check_keep


@dataclass(frozen=True)
class RequestPlan:
    """Tokens of one request in every segment.

    A position counts tokens of prompt and answer; a place counts the tokens that a segment holds.

    Attributes:
        method: that reduces.
        num_prompt_tokens: before any reduction.
        images: offset in the prompt and number of tokens of each image, ascending.
        counts: counts[s][j] visual tokens of image j in segment s.
        ends: possible ends of decision windows, ascending; see `find_windows`.
    """

    method: str
    num_prompt_tokens: int
    images: tuple[tuple[int, int], ...]
    counts: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...] = ()

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The decision windows, ascending."""
        return find_windows(self.num_prompt_tokens, self.images, self.ends)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Prompt tokens without a KV slot in each segment."""
        return self._dropped[-1]

    @property
    def reduces(self) -> bool:
        """Whether any token leaves."""
        return self.dropped[-1] > 0

    def dropped_before(self, position: int) -> tuple[int, ...]:
        """Tokens before a position without a KV slot in each segment; inside an image, those of earlier images."""
        return self._dropped[bisect_right(self._image_ends, position)]

    def num_kv_tokens(self, segment: int, num_tokens: int) -> int:
        """Tokens that a segment's KV cache holds once `num_tokens` of the request have been computed.

        It is also the place of the token at this position.

        Args:
            segment: index.
            num_tokens: number of tokens of prompt and answer.
        """
        return num_tokens - self.dropped_before(num_tokens)[segment]

    def chunk(self, start: int, num_tokens: int) -> int:
        """The number of tokens that a step may compute without cutting a window.

        Args:
            start: tokens that have been computed.
            num_tokens: the most that the step has room for.
        """
        if not self.reduces:
            return num_tokens
        end = start + num_tokens
        for window in self.windows:
            # After its images a window is plain text, which a prefix cache may have in part.
            if start <= window.start < end < window.end:
                return window.start - start
        return num_tokens

    def reusable(self, num_tokens: int, block: int) -> int:
        """The longest prefix in whole blocks of every segment whose KV another request may take over.

        Args:
            num_tokens: the most that it may have.
            block: tokens of one block.
        """
        length = num_tokens - num_tokens % block
        for window in reversed(self.windows):
            # The hash of a block that the prompt does not fill could not name the window.
            named = window.start // block < self.num_prompt_tokens // block
            whole = named and all(drop % block == 0 for index in window.images for drop in self._drops[index])
            if window.start < length and not (whole and self._image_ends[window.images[-1]] <= length):
                length = window.start - window.start % block
        return length

    def prompt_block(self, segment: int, index: int, block: int) -> int:
        """The prompt block whose hash identifies a block of a segment's cache.

        After an image it is the one with the same last token; blocks of survivors take those of the image. The mapping
        ascends and is injective.

        Args:
            segment: index of the segment.
            index: index of the segment's block.
            block: tokens of one block.
        """
        images_before = bisect_right(self._survivor_ends[segment], (index + 1) * block)
        return index + self._dropped[images_before][segment] // block

    @cached_property
    def _image_ends(self) -> tuple[int, ...]:
        return tuple(offset + length for offset, length in self.images)

    @cached_property
    def _drops(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each image without a slot in each segment."""
        return tuple(
            tuple(length - counts[index] for counts in self.counts)
            for index, (_, length) in enumerate(self.images)
        )

    @cached_property
    def _dropped(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of the first n images without a slot in each segment, for every n."""
        totals = [(0,) * len(self.counts)]
        for drops in self._drops:
            totals.append(tuple(map(add, totals[-1], drops)))
        return tuple(totals)

    @cached_property
    def _survivor_ends(self) -> tuple[tuple[int, ...], ...]:
        """Place after the last token of each image, for every segment."""
        return tuple(
            tuple(end - self._dropped[index + 1][segment] for index, end in enumerate(self._image_ends))
            for segment in range(len(self.counts))
        )


@dataclass(frozen=True, eq=False)
class DecoderPlanner:
    """All plans of one decoder under one configuration.

    Attributes:
        config: settings of the server.
        segments: segments of the decoder.
        num_visual_tokens: visual tokens of the largest image that enters the decoder under the tower's default budget.
        most: a budget that is always allowed, even for prompts whose images are smaller; 0 where all images have
            the same number of tokens.
        first_layer: the first layer in which tokens may leave; to the outputs of earlier ones the decoder adds
            deepstack features of all visual tokens.
    """

    config: FicocoConfig
    segments: Segments
    num_visual_tokens: int
    most: int = 0
    first_layer: int = 0

    @classmethod
    def shared(
        cls,
        config: FicocoConfig,
        num_layers: int,
        num_visual_tokens: int,
        most: int = 0,
        first_layer: int = 0,
    ) -> "DecoderPlanner":
        """The cached planner of these settings, validated once.

        Args:
            config: settings of the server, with a method that works in the decoder.
            num_layers: number of layers of the decoder.
            num_visual_tokens: see the attributes.
            most: see the attributes.
            first_layer: see the attributes.

        Raises:
            ValueError: the settings do not fit the decoder.
        """
        return _shared(config.model_dump_json(), num_layers, num_visual_tokens, most, first_layer)

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """Methods that a request may name."""
        reducers = {name: get(name).configure() for name in available("decoder")}
        return tuple(
            name
            for name, reducer in reducers.items()
            if reducer.signals <= SITES["decoder"] and _why_not(reducer) is None
        )

    @property
    def method(self) -> str:
        """The method of a request that names none."""
        method = self.config.decoder_method
        assert method is not None
        return method.name

    @cached_property
    def keep(self) -> int:
        """Tokens of the largest image in the last segment where a request names no budget.

        Raises:
            ValueError: no number of tokens meets the settings' average over the layers. Where images differ in size
                only an average above all tokens is refused: smaller images reach lower ones than the largest.
        """
        num_tokens, budget = self.num_visual_tokens, self.config.kv_budget
        if budget is not None:
            least = 0.0 if self.most else fmean(self.counts(self.method, num_tokens, 1))
            if not least <= budget <= num_tokens:
                lowest = "above 0" if self.most else f"{least:.2f} (one token left in the end)"
                raise ValueError(
                    f"ficoco.kv_budget = {budget} is not allowed; allowed: {lowest} to {num_tokens}"
                )
        return self.keep_of(num_tokens)

    def keep_of(self, num_tokens: int) -> int:
        """Tokens of an image in the last segment where a request names no budget.

        Args:
            num_tokens: number of tokens of the image as it enters the decoder.
        """
        return _keep_of(self, num_tokens)

    def reducer(self, method: str) -> Reducer:
        """A method with the server's settings if it is the server's method, else with its own defaults."""
        return _reducer(self, method)

    def reducing_segments(self, method: str) -> tuple[int, ...]:
        """Segments in whose last layer a method removes tokens, ascending.

        Raises:
            ValueError: a layer that the settings name is not one of this decoder, or counts are given for layers of
                one segment.
        """
        reducer = self.reducer(method)
        layers = _layers(reducer, self.segments.num_layers, self.first_layer)
        segments = sorted({self.segments.nearest(layer, self.first_layer) for layer in layers})
        if getattr(reducer.settings, "layers", None) is None:
            return tuple(range(segments[0], self.segments.num_segments - 1))
        if len(segments) < len(layers) and not isinstance(_schedule(reducer), str):
            ends = ", ".join(
                str(self.segments.end(segment)) for segment in self.segments.reducing(self.first_layer)
            )
            raise ValueError(
                f"ficoco.layers = {layers} with a count for each: two are in one segment, which reduces once; allowed: "
                f"layers nearest to different ones of {ends} (the last layers of the segments), or more num_segments"
            )
        return tuple(segments)

    def counts(self, method: str, num_tokens: int, keep: int) -> tuple[int, ...]:
        """Visual tokens of one image in every segment.

        Args:
            method: that reduces.
            num_tokens: that enter the decoder.
            keep: tokens to leave in the last segment; an image that has fewer keeps them all.

        Raises:
            ValueError: the method's schedule cannot do it.
        """
        return _counts(self, method, num_tokens, min(keep, num_tokens))

    def plan(
        self, num_prompt_tokens: int, images: Sequence[tuple[int, int]], extra_args: Mapping[str, Any] | None
    ) -> RequestPlan:
        """The plan of a request, in which each image has the whole budget.

        Args:
            num_prompt_tokens: including placeholders of images.
            images: offset and number of tokens of each.
            extra_args: the request's `vllm_xargs`, or None. Only `KEEP`, `METHOD` and `WINDOW` are read.

        Raises:
            ValueError: starting with the field, then its value and what is allowed.
        """
        extra_args = extra_args or {}
        method = extra_args.get(METHOD, self.method)
        if method not in self.methods:
            raise ValueError(
                f"{METHOD} = {method!r} is not a method that the decoder of this server can run; "
                f"allowed: {', '.join(self.methods)}"
            )
        budget = None
        if KEEP in extra_args:
            most = max([self.num_visual_tokens, self.most, *(length for _, length in images)])
            budget = check_keep(extra_args[KEEP], most)
        images = sorted(images)
        per_image = []
        for _, length in images:
            keep = self.keep_of(length) if budget is None else budget
            try:
                per_image.append(self.counts(method, length, keep))
            except ValueError as error:
                raise ValueError(f"{KEEP} = {keep}: {error}") from error
        counts = tuple(zip(*per_image, strict=True))
        empty: tuple[tuple[int, ...], ...] = ((),) * self.segments.num_segments
        ends = read_ends(extra_args[WINDOW], num_prompt_tokens) if WINDOW in extra_args else ()
        return RequestPlan(method, num_prompt_tokens, tuple(images), counts or empty, ends)

    def check_windows(self, plan: RequestPlan) -> None:
        """Refuse a window that no step of the server can hold.

        Args:
            plan: plan of a request that names the ends of its windows.

        Raises:
            ValueError: starting with the field.
        """
        most = self.config.window_tokens
        if self.config.windows != "turn" or most is None or not plan.reduces:
            return
        for window in plan.windows:
            if window.end - window.start > most:
                raise ValueError(
                    f"{WINDOW}: tokens {window.start} to {window.end - 1} of the prompt, from an image to the end of "
                    f"its turn, are {window.end - window.start}; allowed: {most}, which one step computes "
                    "(fewer images in a turn, or a server with a larger --max-num-batched-tokens)"
                )


def _layers(reducer: Reducer, num_layers: int, first_layer: int) -> tuple[int, ...]:
    """Layers that a method names, or only the first one if it reduces in all from there on.

    Deviation: defaults before `first_layer` move to it.
    """
    settings = reducer.settings
    name = "layers" if getattr(settings, "layers", None) is not None else "start_layer"
    value = getattr(settings, name, None)
    layers = value if isinstance(value, tuple) else (DECODER_START_LAYER if value is None else value,)
    if name not in settings.model_fields_set:
        return tuple(max(layer, first_layer) for layer in scaled(layers, num_layers))
    if max(layers) > num_layers - 2 or min(layers) < first_layer:
        raise ValueError(
            f"ficoco.{name} = {value} is not allowed; allowed: layers {first_layer} to {num_layers - 2}, "
            "since after the last one there is nothing left to save"
            + (", and earlier ones receive deepstack features of all visual tokens" if first_layer else "")
        )
    return layers


def _why_not(reducer: Reducer) -> str | None:
    """Reason why a method cannot run in the decoder, regardless of its signals; None if it can."""
    if reducer.num_extra:
        return (
            f"ficoco.method = {reducer.method.name!r}: its fused extra tokens have no place in the prompt, "
            "which the decoder's KV cache needs; choose another `compress`"
        )
    if reducer.needs_grid or getattr(reducer.settings, "local_penalty", False):
        return (
            "ficoco.filter and ficoco.correlate by places in the image and ficoco.local_penalty are not allowed "
            "in the decoder, where only the order of the tokens is known"
        )
    return None


@lru_cache(maxsize=64)
def _reducer(planner: DecoderPlanner, method: str) -> Reducer:
    settings = planner.config.settings if method == planner.method else {}
    reducer = get(method).configure(**settings)
    reducer.check_signals(SITES["decoder"])
    return reducer


@lru_cache(maxsize=4096)
def _keep_of(planner: DecoderPlanner, num_tokens: int) -> int:
    budget = planner.config.kv_budget
    if budget is None:
        if planner.config.keep is not None:
            return planner.config.keep
        pipeline = PIPELINES.get(planner.config.method or "")
        return default_keep(num_tokens) if pipeline is None else pipeline.decoder_keep(num_tokens)

    def mean(keep: int) -> float:
        return fmean(planner.counts(planner.method, num_tokens, keep))

    # An image that the method cannot bring down to the average keeps a single token in the last segment.
    return max(1, bisect_right(range(1, num_tokens + 1), budget, key=mean))


def _schedule(reducer: Reducer) -> Any:
    """Name of a schedule, or what each reducing segment removes."""
    return getattr(reducer.settings, "schedule", reducer.method.default_schedule)


@lru_cache(maxsize=4096)
def _counts(planner: DecoderPlanner, method: str, num_tokens: int, keep: int) -> tuple[int, ...]:
    reducer = planner.reducer(method)
    schedule = _schedule(reducer)
    segments = planner.reducing_segments(method)
    if keep == num_tokens and isinstance(schedule, str):
        return (num_tokens,) * planner.segments.num_segments
    removed = make_schedule(schedule, num_tokens, keep, segments, 0, reducer.max_removed)
    counts = [num_tokens]
    for segment in range(planner.segments.num_segments - 1):
        counts.append(counts[-1] - removed.get(segment, 0))
    return _in_multiples(tuple(counts), planner.config.rounding, reducer.max_removed)


def _in_multiples(
    counts: tuple[int, ...], rounding: int, max_removed: Callable[[int], int]
) -> tuple[int, ...]:
    """Counts that leave the image in multiples of `rounding`, so that blocks after it are whole in every segment.

    The last segment never keeps more than before, the others are the nearest. Where the method cannot remove as many,
    or nothing would be left, the counts stay as they are.

    Args:
        counts: visual tokens of an image in every segment.
        rounding: tokens.
        max_removed: the most tokens that one reduction may remove, as a function of their number.
    """
    first, last = counts[0], counts[-1]
    most = -(-(first - last) // rounding) * rounding
    if most >= first:
        return counts
    rounded = tuple(
        first - (most if count == last else min(most, round((first - count) / rounding) * rounding))
        for count in counts
    )
    possible = all(before - after <= max_removed(before) for before, after in pairwise(rounded))
    return rounded if possible else counts


@cache
def _shared(
    config_json: str, num_layers: int, num_visual_tokens: int, most: int, first_layer: int
) -> DecoderPlanner:
    config = FicocoConfig.model_validate_json(config_json)
    method = config.decoder_method
    assert method is not None
    reducer = method.configure(**config.settings)
    why_not = _why_not(reducer)
    if why_not is not None:
        raise ValueError(why_not)
    if config.num_segments is None:
        segments = Segments.choose(num_layers, _layers(reducer, num_layers, first_layer))
    else:
        segments = Segments(num_layers, config.num_segments)
    if segments.num_segments < 2:
        raise ValueError(
            f"ficoco.num_segments: a decoder of {num_layers} layers in one segment cannot reduce"
        )
    if not segments.reducing(first_layer):
        raise ValueError(
            f"ficoco.num_segments = {segments.num_segments}: no segment of {segments.size} layers ends in one of the "
            f"layers {first_layer} to {num_layers - 2}, in which tokens may leave: earlier ones receive deepstack "
            "features of all visual tokens"
        )
    planner = DecoderPlanner(config, segments, num_visual_tokens, most, first_layer)
    planner.reducing_segments(method.name)
    planner.plan(num_visual_tokens + 1, [(0, num_visual_tokens)], {KEEP: planner.keep})
    return planner
