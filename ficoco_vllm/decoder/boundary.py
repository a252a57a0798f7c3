"""Row indices between the segments of a step, built on the host before the step runs.

The rows of a step are the tokens of its requests, one request after the other. A request whose prompt is reduced has
fewer rows from segment to segment; its plan gives their number and the place of every row. Only the choice of the
visual tokens that fill the places of an image depends on the data.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from ficoco_vllm.planning.decoder import RequestPlan

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageGroup:
    """B images that one method reduces from N to K tokens at the same boundary, as indices.

    Rows are those of the segment before the boundary; places count the rows of one request.

    Attributes:
        method: name.
        visual: (B, N) rows of the visual tokens.
        kept: (B, K) rows after the boundary that the kept tokens take.
        text: (B, M) rows of the prompt's text tokens after each image. Shorter texts are padded on the left.
        has_text: (B, M) false where padded.
        text_place: (B, M) places of `text`.
        visual_place: (B, N) places of `visual`.
        context: (B, T) rows of the whole prompt, padded on the right.
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
class _Image:
    """One image of a step at one boundary."""

    row: int
    num_tokens: int
    num_kept: int
    row_after: int
    request_row: int
    prompt_places: int
    text_places: tuple[int, ...]
    first_row: int


def num_rows(query_start: Sequence[int], plans: Sequence[RequestPlan | None], segment: int) -> list[int]:
    """Rows of each request of a step in one segment.

    Args:
        query_start: first row of each request in the first segment, and one for the end.
        plans: of the requests that are reduced in this step, None for the rest.
        segment: index.
    """
    return [
        query_start[index + 1] - query_start[index] - (plan.dropped[segment] if plan else 0)
        for index, plan in enumerate(plans)
    ]


def boundary(
    query_start: Sequence[int],
    plans: Sequence[RequestPlan | None],
    segment: int,
    needs_equal_text: Callable[[str], bool],
) -> Boundary:
    """The boundary after a segment.

    Args:
        query_start: first row of each request in the first segment, and one for the end.
        plans: of the requests that are reduced in this step, None for the rest.
        segment: the one before the boundary.
        needs_equal_text: whether a method can only take images with equally many text tokens together.
    """
    starts = [0, *accumulate(num_rows(query_start, plans, segment))]
    starts_after = [0, *accumulate(num_rows(query_start, plans, segment + 1))]
    source = np.empty(starts_after[-1], dtype=np.int64)
    groups: dict[tuple[str, int, int, int], list[_Image]] = defaultdict(list)
    for index, plan in enumerate(plans):
        row, row_after = starts[index], starts_after[index]
        for image in _images(plan, segment, row, row_after, query_start[index]) if plan else ():
            length = image.row - row  # rows since the previous image
            source[row_after : row_after + length] = np.arange(row, row + length)
            row, row_after = image.row + image.num_tokens, image.row_after + image.num_kept
            source[image.row_after : row_after] = np.arange(image.row, image.row + image.num_kept)
            if image.num_kept < image.num_tokens:
                assert plan is not None
                num_text = len(image.text_places) if needs_equal_text(plan.method) else 0
                groups[plan.method, image.num_tokens, image.num_kept, num_text].append(image)
        source[row_after : starts_after[index + 1]] = np.arange(row, starts[index + 1])
    return Boundary(source, tuple(_group(method, images) for (method, *_), images in groups.items()))


def _images(plan: RequestPlan, segment: int, row: int, row_after: int, first_row: int) -> list[_Image]:
    """The images of one request, in order; `first_row` is its row in the first segment."""
    counts, counts_after = plan.counts[segment], plan.counts[segment + 1]
    prompt_places = plan.num_prompt_tokens - plan.dropped[segment]
    text_places: list[int] = []
    images = []
    gone, gone_after = plan.dropped[segment], plan.dropped[segment + 1]
    end = plan.num_prompt_tokens
    for (offset, length), count, count_after in reversed(
        list(zip(plan.images, counts, counts_after, strict=True))
    ):
        # From the last image to the first, so that the text after an image is known when it is reached.
        text_places = [*range(offset + length - gone, end - gone), *text_places]
        gone -= length - count
        gone_after -= length - count_after
        end = offset
        images.append(
            _Image(
                row=row + offset - gone,
                num_tokens=count,
                num_kept=count_after,
                row_after=row_after + offset - gone_after,
                request_row=row,
                prompt_places=prompt_places,
                text_places=tuple(text_places),
                first_row=first_row + offset,
            )
        )
    return images[::-1]


def _group(method: str, images: list[_Image]) -> ImageGroup:
    rows = np.array([image.row for image in images], dtype=np.int64)[:, None]
    request_rows = np.array([image.request_row for image in images], dtype=np.int64)[:, None]
    rows_after = np.array([image.row_after for image in images], dtype=np.int64)[:, None]
    most_text = max(len(image.text_places) for image in images)
    text_place = np.zeros((len(images), most_text), dtype=np.int64)
    has_text = np.zeros((len(images), most_text), dtype=np.bool_)
    for index, image in enumerate(images):
        first = most_text - len(image.text_places)
        text_place[index, first:] = image.text_places
        has_text[index, first:] = True
    places = np.arange(max(image.prompt_places for image in images))[None]
    lengths = np.array([image.prompt_places for image in images], dtype=np.int64)[:, None]
    visual = rows + np.arange(images[0].num_tokens)
    return ImageGroup(
        method=method,
        visual=visual,
        kept=rows_after + np.arange(images[0].num_kept),
        text=request_rows + text_place,
        has_text=has_text,
        text_place=text_place,
        visual_place=visual - request_rows,
        # Padded with the first row: such places come after every query and are masked.
        context=request_rows + np.where(places < lengths, places, 0),
        first_row=tuple(image.first_row for image in images),
    )
