"""Tokens of a batch before and after the placeholders of removed tokens leave: indices, on the host."""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ficoco_vllm.hf.images import ImageTokens

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """The tokens of B prompts that enter the language model, row after row.

    Attributes:
        enters: (B, S) the tokens of the caller that enter; padding and placeholders without a token do not.
        spans: for each prompt: index among the batch's images, offset among the prompt's tokens and number of tokens of
            each image.
    """

    enters: Bools
    spans: tuple[tuple[tuple[int, int, int], ...], ...]

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, images: Sequence[ImageTokens], image_token: int) -> "Batch":
        """Match images with placeholders. The last ones of an image stay, where the text after it continues.

        Args:
            ids: (B, S) int64.
            mask: (B, S) false for padding.
            images: in the order of the prompts.
            image_token: id of a placeholder.

        Raises:
            ValueError: images and placeholders do not fit.
        """
        enters = mask.cpu().numpy().astype(np.bool_)
        is_image = (ids == image_token).cpu().numpy() & enters
        waiting = list(enumerate(images))
        spans = []
        for row, placeholders in enumerate(is_image):
            columns = np.flatnonzero(placeholders)
            of_row = []
            while len(columns):
                length = waiting[0][1].num_placeholders if waiting else 0
                if not length or len(columns) < length or columns[length - 1] - columns[0] != length - 1:
                    raise _mismatch(is_image, images)
                index, image = waiting.pop(0)
                count = len(image.tokens)
                enters[row, columns[: length - count]] = False
                offset = int(enters[row, : columns[length - count]].sum()) if count else 0
                of_row.append((index, offset, count))
                columns = columns[length:]
            spans.append(tuple(of_row))
        if waiting:
            raise _mismatch(is_image, images)
        return cls(enters, tuple(spans))

    @property
    def counts(self) -> list[int]:
        """Tokens of each prompt."""
        return [int(count) for count in self.enters.sum(axis=1)]

    @property
    def starts(self) -> list[int]:
        """First row of each prompt among the tokens of all, and one for the end."""
        return [0, *accumulate(self.counts)]

    def image_rows(self) -> Tensor:
        """Rows that the images' tokens take, image by image, (tokens of all images,) int64."""
        rows = [
            torch.arange(start + offset, start + offset + count)
            for start, spans in zip(self.starts, self.spans, strict=False)
            for _, offset, count in spans
        ]
        return torch.cat(rows)

    def last_row(self) -> Tensor:
        """The row of the last token up to each of the caller's positions, (B, S) int64; -1 before the first."""
        place = np.cumsum(self.enters, axis=1) - 1
        starts = np.array(self.starts[:-1])[:, None]
        return torch.from_numpy(np.where(place < 0, -1, place + starts))


def questions_about(
    images: Sequence[Sized], ids: Tensor, mask: Tensor, image_token: int, special: Sequence[int]
) -> list[Tensor]:
    """The prompt of each image as the question about it, as a server takes one without messages.

    Args:
        images: in the order of the prompts; their lengths are those of their placeholders.
        ids: (B, S) int64.
        mask: (B, S) false for padding.
        image_token: id of a placeholder.
        special: ids of special tokens, which are not text.

    Returns:
        Tokens (M,) int64 for each image.
    """
    is_image = (ids == image_token) & mask
    ends = is_image.sum(dim=1).cumsum(dim=0)
    starts = ids.new_tensor([0, *accumulate(map(len, images))][:-1])
    # Images beyond the placeholders are refused when they are matched.
    rows = torch.searchsorted(ends, starts, right=True).clamp(max=len(ids) - 1).tolist()
    is_text = mask & ~torch.isin(ids, ids.new_tensor([image_token, *special]))
    return [ids[row][is_text[row]] for row in rows]


def padded(rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of several prompts side by side, padded on the left with zeros.

    Args:
        rows: (tokens, ...), prompt after prompt.
        counts: tokens of each prompt.

    Returns:
        (B, longest, ...), and (B, longest) bool, false where padded.
    """
    longest = max(counts)
    lengths = torch.tensor(list(counts), device=rows.device)[:, None]
    valid = torch.arange(longest, device=rows.device)[None] >= longest - lengths
    result = rows.new_zeros((len(counts), longest, *rows.shape[1:]))
    result[valid] = rows
    return result, valid


def spread(rows: Tensor, origin: Tensor, batch: Batch) -> Tensor:
    """Hidden states at the caller's positions; a removed token gets that of the last remaining token before it.

    Args:
        rows: (rows, D) of the tokens that are left.
        origin: (rows,) int64, ascending, their rows when they entered.
        batch: tokens that entered.

    Returns:
        (B, S, D); zeros where no token has come.
    """
    left = torch.zeros(batch.starts[-1], dtype=torch.int64, device=rows.device)
    left[origin] = 1
    so_far = torch.cat([left.new_zeros(1), left.cumsum(0)])
    last = batch.last_row().to(rows.device)
    starts = so_far[torch.tensor(batch.starts[:-1], device=rows.device)][:, None]
    index = so_far[last + 1] - 1
    index = torch.where((last < 0) | (index < starts), rows.shape[0], index)
    return torch.cat([rows, torch.zeros_like(rows[:1])])[index]


def _mismatch(is_image: Bools, images: Sequence[ImageTokens]) -> ValueError:
    return ValueError(
        f"input_ids has {is_image.sum(axis=1).tolist()} image placeholders in its rows, and the images have "
        f"{[len(image) for image in images]} tokens before reduction; each image needs its own, without a gap"
    )
