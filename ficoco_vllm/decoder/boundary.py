"""Where every token of a step lies in every segment: indices, built on the host before the step runs.

The rows of a step are the tokens of its requests, one request behind the other. A request whose prompt is reduced
has fewer rows from segment to segment; how many is known from its plan, and so is the place of every row. Only which
visual tokens fill the places of an image is decided by the data.
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

    Rows are those of the segment in front of the boundary, places count the rows of one request.

    Attributes:
        method: name.
        visual: (B, N) rows of the visual tokens.
        kept: (B, K) rows behind the boundary where the tokens that stay go.
        text: (B, M) rows of the text tokens of the prompt behind each image. Shorter texts are filled up in front,
            so that the last one stays the last.
        has_text: (B, M) false where filled up.
        text_place: (B, M) places of `text`.
        visual_place: (B, N) places of `visual`.
        context: (B, T) rows of the whole prompt, filled up behind.
        first_row: of each image, the row of its first token in the first segment.
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
    """What happens between two segments.

    Attributes:
        source: (rows behind,) the row in front that each row behind comes from; for the places of images that are
            reduced here, anything.
        groups: of the images that are reduced here.
    """

    source: Index
    groups: tuple[ImageGroup, ...]


@dataclass(frozen=True)
class _Image:
    """One image of a step at one boundary."""

    row: int
    num_tokens: int
    num_kept: int
    row_behind: int
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
    """Indices of what happens behind a segment.

    Args:
        query_start: first row of each request in the first segment, and one for the end.
        plans: of the requests that are reduced in this step, None for the rest.
        segment: the one in front of the boundary.
        needs_equal_text: whether a method can only take images with equally many text tokens together.
    """
    starts = [0, *accumulate(num_rows(query_start, plans, segment))]
    starts_behind = [0, *accumulate(num_rows(query_start, plans, segment + 1))]
    source = np.empty(starts_behind[-1], dtype=np.int64)
    groups: dict[tuple[str, int, int, int], list[_Image]] = defaultdict(list)
    for index, plan in enumerate(plans):
        row, row_behind = starts[index], starts_behind[index]
        for image in _images(plan, segment, row, row_behind, query_start[index]) if plan else ():
            length = image.row - row  # rows that were not looked at yet, in front of this image
            source[row_behind : row_behind + length] = np.arange(row, row + length)
            row, row_behind = image.row + image.num_tokens, image.row_behind + image.num_kept
            source[image.row_behind : row_behind] = np.arange(image.row, image.row + image.num_kept)
            if image.num_kept < image.num_tokens:
                assert plan is not None
                num_text = len(image.text_places) if needs_equal_text(plan.method) else 0
                groups[plan.method, image.num_tokens, image.num_kept, num_text].append(image)
        source[row_behind : starts_behind[index + 1]] = np.arange(row, starts[index + 1])
    return Boundary(source, tuple(_group(method, images) for (method, *_), images in groups.items()))


def _images(plan: RequestPlan, segment: int, row: int, row_behind: int, first_row: int) -> list[_Image]:
    """The images of one request, in order; `first_row` is its row in the first segment."""
    counts, counts_behind = plan.counts[segment], plan.counts[segment + 1]
    prompt_places = plan.num_prompt_tokens - plan.dropped[segment]
    text_places: list[int] = []
    found = []
    gone, gone_behind = plan.dropped[segment], plan.dropped[segment + 1]
    end = plan.num_prompt_tokens
    for (offset, length), count, count_behind in reversed(
        list(zip(plan.images, counts, counts_behind, strict=True))
    ):
        # From the last image to the first, so that the text behind an image is known when it is reached.
        text_places = [*range(offset + length - gone, end - gone), *text_places]
        gone -= length - count
        gone_behind -= length - count_behind
        end = offset
        found.append(
            _Image(
                row=row + offset - gone,
                num_tokens=count,
                num_kept=count_behind,
                row_behind=row_behind + offset - gone_behind,
                request_row=row,
                prompt_places=prompt_places,
                text_places=tuple(text_places),
                first_row=first_row + offset,
            )
        )
    return found[::-1]


def _group(method: str, images: list[_Image]) -> ImageGroup:
    rows = np.array([image.row for image in images], dtype=np.int64)[:, None]
    request_rows = np.array([image.request_row for image in images], dtype=np.int64)[:, None]
    behind = np.array([image.row_behind for image in images], dtype=np.int64)[:, None]
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
        kept=behind + np.arange(images[0].num_kept),
        text=request_rows + text_place,
        has_text=has_text,
        text_place=text_place,
        visual_place=visual - request_rows,
        # Filled up with the first row: such places come behind every query and are masked.
        context=request_rows + np.where(places < lengths, places, 0),
        first_row=tuple(image.first_row for image in images),
    )
