"""How well visual tokens fit a question, written plainly."""

from typing import Any

import torch
from torch import Tensor


def mean_cosines(shown: Tensor, said: Tensor) -> Tensor:
    """For each visual token the mean of its cosines with the question.

    Args:
        shown: (N, D) vectors of the visual tokens.
        said: (V, D) vectors of the question.

    Returns:
        (1, N).
    """
    rows = [
        sum(float(one @ other / (one.norm() * other.norm())) for other in said) / len(said) for one in shown
    ]
    return torch.tensor([rows])


def embedded(question: str, processor: Any, language_model: Any) -> Tensor:
    """The language model's embeddings of a question, (M, D).

    Args:
        question: its text.
        processor: of transformers, with a tokenizer.
        language_model: of transformers.
    """
    ids = processor.tokenizer(question, add_special_tokens=False).input_ids
    vectors: Tensor = language_model.embed_tokens(torch.tensor(ids))
    return vectors
