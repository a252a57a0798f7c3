"""Reduction in the decoder written plainly on Hugging Face's LLaVA: the oracle of the served one.

Prompt and answer are one sequence, with a mask of its own in every layer instead of a cache, and one token after the
other in the reduction. Nothing of ours is used here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from tests.reference.algorithm1 import ReferenceLlava
from tests.reference.decoder_rules import RULES, Seen


@dataclass
class Shown:
    """An image in a prompt.

    Attributes:
        image: pixels.
        entering: tokens that enter the decoder (fewer than patches: FiCoCo-V has run).
        left: layer to the number of tokens that are left after its attention.
        end: position after the last text token that decides what is left; None for the prompt's end.
    """

    image: Image.Image
    entering: int
    left: Mapping[int, int]
    end: int | None = None


class ReferenceDecoder(ReferenceLlava):
    """Hugging Face's language model unrolled by hand: Llama, Mistral, Qwen2 or Qwen3.

    Attributes:
        stored: what a KV cache makes of keys and values, which attention reads; None keeps them. Reductions look at
            keys as they were computed.
    """

    stored: Callable[[Tensor], Tensor] | None = None

    @property
    def num_patches(self) -> int:
        """Visual tokens of an image before any reduction."""
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    @torch.no_grad()
    def judge(self, method: str, prompt: str, images: list[Shown], answer: list[int]) -> Tensor:
        """Log-probabilities of the candidates at each place of an answer.

        Whether the answer is the greedy one shows in their maxima: up to the first place where it is not, they are
        those of the greedy one.

        Args:
            method: name.
            prompt: with one `<image>` for each image.
            images: in order.
            answer: tokens.

        Returns:
            (tokens, vocabulary), float64.
        """
        return judge(self, method, prompt, images, answer, stored=self.stored)


def judge(
    oracle: Any,
    method: str,
    prompt: str,
    images: list[Shown],
    answer: list[int],
    around: tuple[list[int], list[int]] = ([], []),
    stored: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """See `ReferenceDecoder.judge`.

    Args:
        oracle: of the tower, on Hugging Face's model.
        method: name.
        prompt: with one image token for each image.
        images: in order.
        answer: tokens.
        around: tokens that the processor puts before and after each image.
        stored: see `ReferenceDecoder`.
    """
    decoder = oracle.model.model.language_model
    table = decoder.embed_tokens
    ids: list[int] = []
    for token in oracle.processor.tokenizer(prompt, add_special_tokens=False).input_ids:
        ids += [*around[0], token, *around[1]] if token == oracle.config.image_token_id else [token]
    pieces, spans, waiting, length = [], [], list(images), 0
    for token in ids:
        if token == oracle.config.image_token_id:
            shown = waiting.pop(0)
            pieces.append(oracle.features(shown.image, shown.entering))
            spans.append(range(length, length + len(pieces[-1])))
        else:
            pieces.append(table(torch.tensor([token])))
        length += len(pieces[-1])
    embeddings = torch.cat([*pieces, table(torch.tensor(answer[:-1], dtype=torch.int64))])
    positions = torch.arange(len(embeddings))[None]
    hidden = unroll(decoder, method, embeddings, positions, length, spans, images, stored)
    return torch.log_softmax(oracle.model.lm_head(hidden[length - 1 :]), dim=-1)


def unroll(
    decoder: Any,
    method: str,
    x: Tensor,
    positions: Tensor,
    num_prompt: int,
    spans: list[range],
    images: Sequence[Shown],
    stored: Callable[[Tensor], Tensor] | None = None,
    deepstack: Sequence[Tensor] = (),
) -> Tensor:
    """Hidden states of prompt and answer after the last layer; those of removed tokens are meaningless.

    Args:
        decoder: Hugging Face's language model.
        method: name.
        x: (T, D) embeddings.
        positions: (1, T), or (3, 1, T) for M-RoPE.
        num_prompt: tokens of the prompt.
        spans: places of each image's tokens.
        images: in order.
        stored: see `ReferenceDecoder`.
        deepstack: (T, D) features that are added after the first layers, one for each.
    """
    T = len(x)
    cos, sin = decoder.rotary_emb(x[None], positions)
    alive, size = torch.ones(T, dtype=torch.bool), np.ones(T)
    visual = {i for span in spans for i in span}
    for index, layer in enumerate(decoder.layers):
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        query, key, value = (
            linear(normed).view(1, T, -1, attention.head_dim)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        key, value = (repeat_kv(t, attention.num_key_value_groups) for t in (key, value))
        seen = torch.ones(T, T, dtype=torch.bool).tril() & alive | torch.eye(T, dtype=torch.bool)
        exact = weights = _weigh(query, key, attention.scaling, seen)
        if stored is not None:
            key, value = stored(key), stored(value)
            weights = _weigh(query, key, attention.scaling, seen)
        x = x + attention.o_proj((weights @ value).transpose(1, 2).reshape(T, -1))
        mean = exact[0].mean(0).numpy()
        for span, shown in zip(spans, images, strict=True):
            now = [i for i in span if alive[i]]
            removed = len(now) - shown.left.get(index, len(now))
            if not removed:
                continue
            text = [k for k in range(span.stop, shown.end or num_prompt) if k not in visual]
            state = Seen(
                tokens=x[now].numpy(),
                size=size[now],
                attention=mean[np.ix_(now, now)],
                text=mean[np.ix_(text, now)],
                text_tokens=x[text].numpy(),
            )
            stay, merged, sizes = RULES[method](state, removed)
            kept = [now[i] for i in stay]
            x = x.clone()
            x[kept] = torch.from_numpy(merged).to(x)
            size[kept] = sizes
            alive[now] = False
            alive[kept] = True
        # A mixture of experts needs the dimension of batches.
        x = x + layer.mlp(layer.post_attention_layernorm(x)[None])[0]
        if index < len(deepstack):
            x = x + deepstack[index]
    last: Tensor = decoder.norm(x)
    return last


def _weigh(query: Tensor, key: Tensor, scale: float, seen: Tensor) -> Tensor:
    """Attention of each token to those that it sees."""
    return (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf).softmax(dim=-1)
