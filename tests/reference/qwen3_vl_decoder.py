"""Reduction in the decoder of Hugging Face's Qwen3-VL, written plainly: M-RoPE, norms of heads, deepstack features."""

import torch
from torch import Tensor

from tests.reference.algorithm2 import Shown, unroll
from tests.reference.qwen3_vl import ReferenceQwen


class ReferenceQwenDecoder(ReferenceQwen):
    """Positions are those of the prompt before any reduction."""

    @torch.no_grad()
    def judge(self, method: str, prompt: str, images: list[Shown], answer: list[int]) -> Tensor:
        """Log-probabilities of the candidates at each place of an answer; see `ReferenceDecoder.judge`.

        Args:
            method: name.
            prompt: with one `<|image_pad|>` for each image.
            images: in order; fewer than all units enter where FiCoCo-V has run.
            answer: tokens.

        Returns:
            (tokens, vocabulary), float64.
        """
        model, decoder = self.model.model, self.model.model.language_model
        pad = self.config.image_token_id
        whole: list[int] = []  # the prompt before any reduction
        entering: list[int] = []  # the tokens of it that enter the decoder
        spans: list[range] = []
        encoded, grids = [], []
        for token in self.processor.tokenizer(prompt, add_special_tokens=False).input_ids:
            if token != pad:
                entering.append(len(whole))
                whole.append(token)
                continue
            shown = images[len(spans)]
            rows, columns = self.grid(shown.image)
            tokens, levels, units = self.encode(shown.image, shown.entering)
            spans.append(range(len(entering), len(entering) + len(units)))
            entering += [len(whole) + unit for unit in units]
            whole += [pad] * (rows * columns)
            encoded.append((tokens, levels))
            grids.append([1, 2 * rows, 2 * columns])
        full = torch.tensor([whole])
        of_whole, _ = model.get_rope_index(full, (full == pad).int(), torch.tensor(grids) if grids else None)
        num_prompt, num_more = len(entering), len(answer) - 1
        following = int(of_whole.max()) + 1 + torch.arange(num_more)
        positions = torch.cat([of_whole[:, :, entering], following.expand(3, 1, num_more)], dim=2)
        ids = torch.cat([full[0, entering], torch.tensor(answer[:-1], dtype=torch.int64)])
        embeddings = decoder.embed_tokens(ids)
        deepstack = [torch.zeros_like(embeddings) for _ in self.config.vision_config.deepstack_visual_indexes]
        for span, (tokens, levels) in zip(spans, encoded, strict=True):
            embeddings[list(span)] = tokens
            for features, level in zip(deepstack, levels, strict=True):
                features[list(span)] = level
        hidden = unroll(
            decoder, method, embeddings, positions, num_prompt, spans, images, deepstack=deepstack
        )
        return torch.log_softmax(self.model.lm_head(hidden[num_prompt - 1 :]), dim=-1)
