"""The user's own images and prompts."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.accuracy.workload import Item

MEDIA_TYPES = {f".{name}": f"image/{name}" for name in ("png", "jpeg", "webp", "gif", "bmp")}
MEDIA_TYPES[".jpg"] = MEDIA_TYPES[".jpeg"]
FORM = '{"image": "path.png", "prompt": "..."}'


def read_items(data: Path, prompt: str | None = None) -> list[Item]:
    """Questions of a JSONL file or of a folder of images, in the order of lines or file names.

    Each line of a file is an object `{"image": PATH, "prompt": TEXT}`, with "class" where questions are of several
    kinds; paths are relative to the file. In a folder, a text file of an image's name has its prompts, one a line.
    `prompt` is for questions without one.

    Raises:
        ValueError: naming the line or file, and what is allowed.
    """
    if not data.exists():
        raise ValueError(
            f"--data = {str(data)!r} does not exist; allowed: a JSONL file or a folder of images"
        )
    items = list(_of_folder(data, prompt) if data.is_dir() else _of_lines(data, prompt))
    if not items:
        raise ValueError(
            f"--data = {str(data)!r} holds no question; allowed: lines {FORM}, or images with prompts"
        )
    return items


def shuffled(items: Iterable[Item], seed: int) -> list[Item]:
    """Questions in an order that does not depend on how they were collected."""
    ordered = sorted(items, key=lambda item: item.name)
    random.Random(f"calibration {seed}").shuffle(ordered)
    return ordered


def _of_lines(path: Path, prompt: str | None) -> Iterable[Item]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}); allowed: {FORM}") from error
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            raise ValueError(f"{where}: image is missing or no text; allowed: {FORM}")
        question = row.get("prompt", prompt)
        if not isinstance(question, str) or not question:
            raise ValueError(
                f"{where}: prompt = {question!r} is not allowed; allowed: a text, here or in --prompt"
            )
        kind = row.get("class", "")
        if not isinstance(kind, str):
            raise ValueError(f"{where}: class = {kind!r} is not allowed; allowed: a text")
        yield _item(f"{number:07d}", path.parent / row["image"], question, where, kind)


def _of_folder(folder: Path, prompt: str | None) -> Iterable[Item]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in MEDIA_TYPES:
            continue
        beside = path.with_suffix(".txt")
        prompts = beside.read_text(encoding="utf-8").splitlines() if beside.is_file() else [prompt or ""]
        for number, question in enumerate(filter(None, map(str.strip, prompts))):
            yield _item(f"{path.name}#{number}", path, question, str(path))


def _item(name: str, path: Path, prompt: str, where: str, kind: str = "") -> Item:
    media_type = MEDIA_TYPES.get(path.suffix.lower())
    if media_type is None:
        raise ValueError(f"{where}: image = {path.name!r} is not allowed; allowed: {', '.join(MEDIA_TYPES)}")
    try:
        image = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{where}: image = {str(path)!r} cannot be read ({error.strerror})") from error
    return Item(name, kind, prompt, image, media_type=media_type)
