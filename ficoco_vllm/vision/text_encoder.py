"""The rest of the CLIP from which a vision tower came, for methods that compare the image with the question."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


class ClipText:
    """Text encoder, both projections and last normalisation of a CLIP, as a `Source`.

    A question that does not fit into CLIP's 77 tokens is read in equally weighted parts.

    Deviation: each part has its own start and end; in the authors' code the first part has the start, the last one the
    end, and the others are read at their first token.

    Source: arXiv:2506.10967, Sec. 3.
    """

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device | str) -> None:
        """Load the weights.

        Args:
            name: folder or name of the model.
            dtype: data type of the weights.
            device: where they are stored.
        """
        from transformers import CLIPModel

        model = CLIPModel.from_pretrained(name, dtype=dtype).to(device).eval()
        self._text, self._project_text = model.text_model, model.text_projection
        self._normalise, self._project = model.vision_model.post_layernorm, model.visual_projection
        self._length = model.config.text_config.max_position_embeddings
        tokenizer = text_tokenizer(name)
        self._ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """See `Source`."""
        start, end = (tokens.new_tensor([token]) for token in self._ends)
        parts = torch.split(tokens, self._length - 2) if len(tokens) else (tokens,)
        return torch.cat(
            [
                self._project_text(self._text(torch.cat([start, part, end])[None]).pooler_output)
                for part in parts
            ]
        )

    @torch.no_grad()
    def show(self, units: Tensor) -> Tensor:
        """See `Source`."""
        projected: Tensor = self._project(self._normalise(units))
        return projected


@lru_cache(maxsize=4)
def text_tokenizer(name: str) -> Any:
    """The tokenizer of a CLIP.

    Args:
        name: folder or name of the model.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def check_text_encoder(name: str, hf_config: Any) -> None:
    """Refuse a text encoder that does not belong to the model's vision tower.

    Args:
        name: folder or name of the model.
        hf_config: transformers' configuration of the model that is served.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    from transformers import AutoConfig

    served, field = hf_config.vision_config, f"ficoco.text_encoder = {name!r}"
    if served.model_type != "clip_vision_model":
        raise ValueError(
            f"{field} is not allowed with this model, whose vision tower is not a CLIP; allowed: none, which compares "
            "the question with the visual tokens in the language model's own embeddings"
        )
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{field} cannot be read ({error}); allowed: folder or name of a CLIP") from error
    if config.model_type != "clip":
        raise ValueError(f"{field} is a model of type {config.model_type!r}; allowed: a CLIP, of type 'clip'")
    width, needed = config.vision_config.hidden_size, served.hidden_size
    if width != needed:
        raise ValueError(
            f"{field} has a vision tower of width {width}; allowed: the CLIP from which this model's tower came, of "
            f"width {needed}"
        )
