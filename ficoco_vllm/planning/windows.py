"""Decision windows: the runs of a prompt that alone decide which visual tokens leave."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.request_fields import WINDOW


@dataclass(frozen=True)
class Window:
    """Prompt tokens from an image to the end of the text that decides what is left of it.

    Which visual tokens leave is a pure function of the prompt up to `end`, so the KV cache of any prefix is, too.

    Attributes:
        start: first token of its first image.
        end: position after the last token that decides.
        images: indices of its images.
    """

    start: int
    end: int
    images: range


def find_windows(
    num_prompt_tokens: int, images: Sequence[tuple[int, int]], ends: Sequence[int]
) -> tuple[Window, ...]:
    """The windows of a prompt, ascending; each image is in exactly one.

    An image that begins before the end of a window belongs to that window. An end that leaves no text after the last
    image of its window is ignored; the prompt's end is always one.

    Args:
        num_prompt_tokens: number of tokens of the prompt with its placeholders.
        images: offset and number of tokens of each image, ascending.
        ends: possible ends of windows, ascending.
    """
    windows: list[Window] = []
    first = 0
    while first < len(images):
        start = images[first][0]
        for end in (*ends, num_prompt_tokens):
            last = first
            while last + 1 < len(images) and images[last + 1][0] < end:
                last += 1
            if sum(images[last]) < end:
                break
        windows.append(Window(start, end, range(first, last + 1)))
        first = last + 1
    return tuple(windows)


def find_ends(
    tokens: Sequence[int],
    images: Sequence[tuple[int, int]],
    marker: Sequence[int],
    longest: int | None = None,
) -> list[int]:
    """Ends of the windows of a prompt: after the first generation prompt that follows an image.

    They depend on the token ids alone, so a later turn of the same chat has the same ones.

    Args:
        tokens: token ids of the prompt with its placeholders.
        images: offset and number of tokens of each image, ascending.
        marker: tokens that the chat template appends for the answer. Without any, only the prompt ends a window.
        longest: the most tokens of a window, which ends there if there is text of it before; None for any number.

    Returns:
        One end for each window, ascending.
    """
    ends: list[int] = []
    for index, (offset, length) in enumerate(images):
        if ends and offset < ends[-1]:
            continue
        end = _after(tokens, marker, offset + length)
        if longest is not None and end - offset > longest:
            within = [sum(image) for image in images[index:] if image[0] < offset + longest]
            end = max(offset + longest, max(within, default=0) + 1)
        ends.append(min(end, len(tokens)))
    return ends


def read_ends(value: Any, num_prompt_tokens: int) -> tuple[int, ...]:
    """Validate the ends of windows that a request names.

    Args:
        value: one number or several.
        num_prompt_tokens: number of tokens of the prompt with its placeholders.

    Raises:
        ValueError: starting with the field, then its value and what is allowed.
    """
    ends = list(value) if isinstance(value, list | tuple) else [value]
    # vLLM's request schema may turn an integer into a float.
    ends = [int(end) if isinstance(end, float) and end.is_integer() else end for end in ends]
    if not all(type(end) is int and 0 < end <= num_prompt_tokens for end in ends):
        raise ValueError(
            f"{WINDOW} = {value!r} is not allowed; allowed: integers from 1 to {num_prompt_tokens}, the number of "
            "tokens of the prompt with its placeholders"
        )
    return tuple(sorted(set(ends)))


def _after(tokens: Sequence[int], marker: Sequence[int], start: int) -> int:
    """Position after the first marker from `start` on; the number of tokens where there is none."""
    wanted = list(marker)
    if wanted:
        for place in range(start, len(tokens) - len(wanted) + 1):
            if tokens[place] == wanted[0] and list(tokens[place : place + len(wanted)]) == wanted:
                return place + len(wanted)
    return len(tokens)
