"""Tasks of lmms-eval with our changes, written as files of its own format; nothing of lmms-eval is changed."""

import json
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from PIL import Image

PREFIX = "ficoco_"
# CLIP's mean colour, which becomes zero once the pixels are normalised.
MEAN_COLOUR = (122, 116, 104)
_MODULE = '''"""Images of one task, padded."""

from lmms_eval.utils import load_yaml_config

from ficoco_vllm.benchmarks.lmms.tasks import padded

doc_to_visual = padded(load_yaml_config(yaml_path={path!r})["doc_to_visual"])
'''


def write_task(folder: Path, original: Path, task: str, pad: bool, specific: Mapping[str, Any]) -> str:
    """Write a task that includes another one, a YAML file, into a folder for `--include_path`, and return its name.

    `pad` pads images to squares; `specific` takes the place of the task's `lmms_eval_specific_kwargs.default`, unless
    it is empty.

    Raises:
        ValueError: there is no such file.
    """
    if not original.is_file():
        raise ValueError(
            f"task = {str(original)!r} is not a file; allowed: a task of the installed lmms-eval"
        )
    folder.mkdir(parents=True, exist_ok=True)
    name = PREFIX + task
    lines = [f"include: {json.dumps(str(original))}", f"task: {name}"]
    if pad:
        (folder / f"{name}_images.py").write_text(_MODULE.format(path=str(original)), encoding="utf-8")
        lines.append(f"doc_to_visual: !function {name}_images.doc_to_visual")
    if specific:
        lines += ["lmms_eval_specific_kwargs:", f"  default: {json.dumps(dict(specific))}"]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def padded(doc_to_visual: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A task's function with its images padded as LLaVA-1.5's were."""

    @wraps(doc_to_visual)
    def wrapper(*args: Any, **kwargs: Any) -> list[Any]:
        visuals = doc_to_visual(*args, **kwargs)
        return [pad_to_square(one) if isinstance(one, Image.Image) else one for one in visuals]

    return wrapper


def pad_to_square(image: Image.Image) -> Image.Image:
    """The image in the middle of a square of CLIP's mean colour.

    Source: arXiv:2310.03744, Sec. 3.2; `image_aspect_ratio: pad` of LLaVA-1.5.
    """
    image = image.convert("RGB")
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
