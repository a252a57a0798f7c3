"""Relevance of the visual tokens to the question: the signal `text_relevance`.

Both sources give a vector for each visual token and several for the question; the relevance of a token is the mean of
its cosines with those. OpenVINO GenAI compares the language model's own embeddings like this, the authors of CDPruner
those of CLIP.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Source(Protocol):
    """Source of the vectors."""

    def read(self, tokens: Tensor) -> Tensor:
        """Vectors of a question, (V, D), from its tokens (M,) int64."""

    def show(self, units: Tensor) -> Tensor:
        """Vectors of units, (B, N, D), from the output of the vision tower (B, N, unit * width)."""


class Relevance:
    """The relevance of units for the questions about their images."""

    def __init__(self, source: Source, questions: Sequence[Tensor]) -> None:
        """Read the questions.

        Args:
            source: source of the vectors.
            questions: tokens (M,) int64 of the question about each of B images; without any, all units are equal.
        """
        self._source = source
        vectors = [normalize(source.read(tokens).float(), dim=-1) for tokens in questions]
        # The mean of cosines is a product with the mean of directions.
        self._direction = torch.stack([own.sum(dim=0) / max(1, len(own)) for own in vectors])

    def __call__(self, units: Tensor) -> Tensor:
        """Mean cosine of units and question.

        Args:
            units: (B, N, unit * width), output of the vision tower.

        Returns:
            (B, N) fp32.
        """
        shown = normalize(self._source.show(units).float(), dim=-1)
        # In Hugging Face's models the parts may be on different devices.
        return torch.einsum("bnd,bd->bn", shown, self._direction.to(shown.device)).to(units.device)
