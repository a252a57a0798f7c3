"""Row indices between the segments of a step, built on the host before the step runs.

The rows of a step are the tokens of its requests, one request after the other. A request whose prompt is reduced has
fewer rows from segment to segment; its plan gives their number and the place of every row. Only the choice of the
visual tokens that fill the places of an image depends on the data.

A step need not compute a prompt from its beginning. Keys that earlier steps have computed, or other requests with the
same prefix, are read from the KV cache and numbered before the rows of the step, which graphs may fill up.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from ficoco_vllm.planning.decoder import RequestPlan
from ficoco_vllm.planning.windows import Window

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageGroup:
    """B images that one method reduces from N to K tokens at the same boundary, as indices.

    Rows are those of the segment before the boundary; places count the tokens of one request that it holds.

    Attributes:
        method: name.
        visual: (B, N) rows of the visual tokens.
        kept: (B, K) rows after the boundary that the kept tokens take.
        text: (B, M) rows of the window's text tokens after each image. Shorter texts are padded on the left.
        has_text: (B, M) false where padded.
        text_place: (B, M) places of `text`.
        visual_place: (B, N) places of `visual`.
        context: (B, T) rows of the prompt up to the window's end, padded on the right; keys that were computed
            before the step are numbered first, then its rows.
        num_cached: (B,) number of these cached keys.
        first_row: the row of each image's first token in the first segment.
    """

    method: str
    visual: Index
    kept: Index
    text: Index
    has_text: npt.NDArray[np.bool_]
    text_place: Index
    visual_place: Index
    context: Index
    num_cached: Index
    first_row: tuple[int, ...]


@dataclass(frozen=True)
class Boundary:
    """Rows before and after the reduction between two segments.

    Attributes:
        source: (rows after,) the row before that each row comes from; arbitrary for images that are reduced here.
        groups: the images that are reduced here.
    """

    source: Index
    groups: tuple[ImageGroup, ...]


@dataclass(frozen=True)
class Part:
    """Tokens of a request with a reduced prompt that a step computes.

    Attributes:
        plan: plan of the request.
        start: tokens that were computed before.
        end: tokens that have been computed after the step.
    """

    plan: RequestPlan
    start: int
    end: int

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The windows that are reduced in this step."""
        windows = tuple(window for window in self.plan.windows if self.start <= window.start < self.end)
        assert all(window.end <= self.end for window in windows), "no step cuts a window"
        return windows

    @cached_property
    def dropped_before(self) -> tuple[int, ...]:
        """Number of tokens before the step that each segment does not hold."""
        return self.plan.dropped_before(self.start)

    @cached_property
    def dropped(self) -> tuple[int, ...]:
        """Number of tokens up to the end of the step that each segment does not hold."""
        return self.plan.dropped_before(self.end)

    @property
    def reduces(self) -> bool:
        """Whether any token leaves in this step."""
        return self.dropped != self.dropped_before

    def num_cached(self, segment: int) -> int:
        """Tokens before the step that a segment holds."""
        return self.start - self.dropped_before[segment]


@dataclass(frozen=True)
class _Image:
    """One image of a step at one boundary."""

    row: int
    num_tokens: int
    num_kept: int
    row_after: int
    request_row: int
    num_cached: int
    cached_row: int
    window_places: int
    text_places: tuple[int, ...]
    first_row: int


def num_rows(query_start: Sequence[int], parts: Sequence[Part | None], segment: int) -> list[int]:
    """Rows of each request of a step in one segment.

    Args:
        query_start: first row of each request in the first segment, and one for the end.
        parts: part of each request whose prompt is reduced, None for the others.
        segment: index.
    """
    return [
        query_start[index + 1]
        - query_start[index]
        - (part.dropped[segment] - part.dropped_before[segment] if part else 0)
        for index, part in enumerate(parts)
    ]


def boundary(
    query_start: Sequence[int],
    parts: Sequence[Part | None],
    segment: int,
    needs_equal_text: Callable[[str], bool],
) -> Boundary:
    """The boundary after a segment.

    Args:
        query_start: first row of each request in the first segment, and one for the end.
        parts: part of each request whose prompt is reduced, None for the others.
        segment: the one before the boundary.
        needs_equal_text: whether a method can only take images with equally many text tokens together.
    """
    starts = [0, *accumulate(num_rows(query_start, parts, segment))]
    starts_after = [0, *accumulate(num_rows(query_start, parts, segment + 1))]
    source = np.empty(starts_after[-1], dtype=np.int64)
    groups: dict[tuple[str, int, int, int], list[_Image]] = defaultdict(list)
    cached = [part.num_cached(segment) if part and part.windows else 0 for part in parts]
    cached_starts = [0, *accumulate(cached)]
    for index, part in enumerate(parts):
        row, row_after = starts[index], starts_after[index]
        first_rows = row, row_after, query_start[index], cached_starts[index]
        for image in _images(part, segment, *first_rows) if part else ():
            length = image.row - row  # rows since the previous image
            source[row_after : row_after + length] = np.arange(row, row + length)
            row, row_after = image.row + image.num_tokens, image.row_after + image.num_kept
            source[image.row_after : row_after] = np.arange(image.row, image.row + image.num_kept)
            if image.num_kept < image.num_tokens:
                assert part is not None
                num_text = len(image.text_places) if needs_equal_text(part.plan.method) else 0
                groups[part.plan.method, image.num_tokens, image.num_kept, num_text].append(image)
        source[row_after : starts_after[index + 1]] = np.arange(row, starts[index + 1])
    of_groups = (_group(method, images, cached_starts[-1]) for (method, *_), images in groups.items())
    return Boundary(source, tuple(of_groups))


def _images(
    part: Part, segment: int, row: int, row_after: int, first_row: int, cached_row: int
) -> Iterator[_Image]:
    """The images of one request that a step reduces, in order; the rows are the request's first ones."""
    plan, counts, counts_after = part.plan, part.plan.counts[segment], part.plan.counts[segment + 1]
    num_cached, num_cached_after = part.num_cached(segment), part.num_cached(segment + 1)
    for window in part.windows:
        for index in window.images:
            offset = plan.images[index][0]
            yield _Image(
                row=row + plan.num_kv_tokens(segment, offset) - num_cached,
                num_tokens=counts[index],
                num_kept=counts_after[index],
                row_after=row_after + plan.num_kv_tokens(segment + 1, offset) - num_cached_after,
                request_row=row,
                num_cached=num_cached,
                cached_row=cached_row,
                window_places=plan.num_kv_tokens(segment, window.end),
                text_places=tuple(_text_places(plan, segment, window, index)),
                first_row=first_row + offset - part.start,
            )


def _text_places(plan: RequestPlan, segment: int, window: Window, image: int) -> Iterator[int]:
    """Places of the window's text after an image."""
    for index in range(image, window.images.stop):
        start = sum(plan.images[index])
        end = plan.images[index + 1][0] if index + 1 < window.images.stop else window.end
        place = plan.num_kv_tokens(segment, start)
        yield from range(place, place + end - start)


def _group(method: str, images: list[_Image], num_cached_keys: int) -> ImageGroup:
    rows = np.array([image.row for image in images], dtype=np.int64)[:, None]
    request_rows = np.array([image.request_row for image in images], dtype=np.int64)[:, None]
    rows_after = np.array([image.row_after for image in images], dtype=np.int64)[:, None]
    num_cached = np.array([image.num_cached for image in images], dtype=np.int64)[:, None]
    cached_rows = np.array([image.cached_row for image in images], dtype=np.int64)[:, None]
    most_text = max(len(image.text_places) for image in images)
    text_place = np.repeat(num_cached, most_text, axis=1)
    has_text = np.zeros((len(images), most_text), dtype=np.bool_)
    for index, image in enumerate(images):
        first = most_text - len(image.text_places)
        text_place[index, first:] = image.text_places
        has_text[index, first:] = True
    places = np.arange(max(image.window_places for image in images))[None]
    lengths = np.array([image.window_places for image in images], dtype=np.int64)[:, None]
    visual = rows + np.arange(images[0].num_tokens)
    first_computed = num_cached_keys + request_rows
    computed = first_computed + places - num_cached
    return ImageGroup(
        method=method,
        visual=visual,
        kept=rows_after + np.arange(images[0].num_kept),
        text=request_rows + text_place - num_cached,
        has_text=has_text,
        text_place=text_place,
        visual_place=visual - request_rows + num_cached,
        # Padded with the first row: such places come after every query and are masked.
        context=np.where(
            places < num_cached, cached_rows + places, np.where(places < lengths, computed, first_computed)
        ),
        num_cached=num_cached[:, 0],
        first_row=tuple(image.first_row for image in images),
    )
