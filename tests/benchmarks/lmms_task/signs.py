"""A task of lmms-eval over images on disk."""

from typing import Any

from PIL import Image


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The image."""
    return [Image.open(doc["image"])]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question, after the prefix in the task's settings."""
    return (lmms_eval_specific_kwargs or {}).get("pre_prompt", "") + doc["question"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is right."""
    return {"exact": float(results[0].strip() == doc["answer"])}
