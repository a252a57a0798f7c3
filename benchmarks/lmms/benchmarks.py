"""The paper's ten benchmarks: the task of lmms-eval, its metric, and what must be set to match LLaVA-1.5's own runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        title: as the paper's Table 3 heads its column.
        file: the task's file below lmms-eval's `tasks`.
        scale: factor from lmms-eval's figure to the paper's.
        pad: pad images to squares with CLIP's mean colour, as LLaVA-1.5 does (`image_aspect_ratio: pad`); Hugging
            Face's processor crops the centre instead. Not where lmms-eval's own settings for LLaVA take the original.
        specific: takes the place of the task's `lmms_eval_specific_kwargs.default`.
        note: differences from the paper, shown in the table.
    """

    title: str
    file: str
    metric: str = "exact_match"
    scale: float = 100.0
    pad: bool = True
    specific: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def task(self) -> str:
        """The task's name."""
        return Path(self.file).stem.replace("-", "_")


_SHORT = "\nAnswer the question using a single word or phrase."
# LLaVA-1.5's figure has the tokens of an OCR system in the prompt; lmms-eval leaves them out by default.
_OCR = {"pre_prompt": "", "post_prompt": _SHORT, "ocr": True}
_F1 = "F1; the paper does not say which it prints"
_JUDGED = "needs a judge model"
_WILD = "llava-in-the-wild/llava-in-the-wild.yaml"
_GPT = ("gpt_eval_score", 1.0)
BENCHMARKS: Mapping[str, Benchmark] = {
    "sqa": Benchmark("SQA", "scienceqa/scienceqa_img.yaml", pad=False, note="questions with an image"),
    "textvqa": Benchmark("VQA^T", "textvqa/textvqa_val.yaml", specific=_OCR),
    "pope": Benchmark("POPE", "pope/pope.yaml", "pope_f1_score", note=_F1),
    "vizwiz": Benchmark("Vizwiz", "vizwiz_vqa/vizwiz_vqa_val.yaml", note="val; the paper: test"),
    "mm-vet": Benchmark("MM-Vet", "mmvet/mmvet.yaml", *_GPT, note=_JUDGED),
    "mmbench-cn": Benchmark("MMBCN", "mmbench/mmbench_cn_dev.yaml", *_GPT, False, note=f"dev; {_JUDGED}"),
    "gqa": Benchmark("GQA", "gqa/gqa.yaml"),
    "llava-w": Benchmark("LLAVA-W", _WILD, "gpt_eval_llava_all", 1.0, False, note=_JUDGED),
    "mmbench": Benchmark("MMB", "mmbench/mmbench_en_dev.yaml", *_GPT, False, note=f"dev; {_JUDGED}"),
    "vqav2": Benchmark("VQAv2", "vqav2/vqav2_val.yaml", note="val; the paper: test-dev"),
}

# The paper's Table 3, LLaVA-1.5-7B, in the order of BENCHMARKS. The key is the method and the tokens of an image
# after the tower (64, 128, 192 are 1.5, 2.4, 3.3 TFLOPs); for the decoder's methods it is the TFLOPs point that the
# table names, since the paper gives no schedule for it (docs/paper-tables.md).
PAPER: Mapping[tuple[str, str], tuple[float, ...]] = {
    ("full", "8.5"): (69.5, 58.2, 86.4, 50.0, 31.6, 59.3, 62.5, 63.7, 66.1, 79.1),
    ("ficoco-v", "3.3"): (67.8, 55.7, 82.5, 51.5, 29.7, 55.3, 58.5, 60.4, 62.3, 74.4),
    ("ficoco-l", "3.3"): (69.6, 56.6, 84.6, 48.7, 31.4, 53.6, 61.1, 60.3, 64.6, 76.8),
    ("ficoco-vl", "3.3"): (68.3, 55.1, 84.7, 50.5, 28.4, 56.2, 58.7, 55.7, 63.7, 74.8),
    ("ficoco-v", "2.4"): (68.3, 55.6, 82.2, 49.4, 28.2, 54.3, 57.6, 56.6, 61.1, 73.1),
    ("ficoco-l", "2.4"): (69.4, 56.3, 84.4, 48.4, 30.1, 53.5, 60.6, 59.4, 64.4, 76.4),
    ("ficoco-vl", "2.4"): (68.2, 54.9, 79.5, 48.9, 28.1, 55.5, 57.7, 57.6, 61.9, 73.9),
    ("ficoco-v", "1.5"): (68.4, 55.5, 79.8, 52.4, 26.8, 53.0, 57.4, 58.6, 60.2, 74.8),
    ("ficoco-l", "1.5"): (69.5, 55.7, 84.1, 48.2, 27.4, 53.3, 60.0, 57.3, 64.0, 75.6),
    ("ficoco-vl", "1.5"): (68.1, 54.7, 79.3, 49.7, 29.6, 54.4, 57.4, 56.6, 60.2, 75.3),
}
POINT_OF_KEEP = {192: "3.3", 128: "2.4", 64: "1.5"}


def paper_figure(name: str, method: str | None, keep: int | None) -> float | None:
    """What the paper prints for a benchmark of BENCHMARKS, None if nothing; None as method is all visual tokens."""
    row = PAPER.get(("full", "8.5") if method is None else (method, POINT_OF_KEEP.get(keep or 0, "")))
    return None if row is None or name not in BENCHMARKS else row[list(BENCHMARKS).index(name)]
