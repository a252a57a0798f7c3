"""Drafts by n-grams on a CPU, where vLLM's kernel for them does not run in Triton's interpreter."""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

from ficoco_vllm.hooks.wrapping import wrap


def hook_drafts() -> None:
    """Compute drafts in torch in this process. Idempotent."""
    wrap(NgramGPUSpeculator, "propose", _propose)


@torch.inference_mode()
def _propose(original: Any, self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The tokens that followed the longest and latest earlier occurrence of a request's last tokens.

    Where there is none, or too few tokens follow, the last sampled token is repeated, as in vLLM's kernel.

    Returns:
        (requests, drafts) int64.
    """
    if kwargs.get("dummy_run"):
        dummy: Tensor = original(self, input_batch, *args, **kwargs)
        return dummy
    drafts: Tensor = self.drafts[: input_batch.num_reqs]
    last_sampled = kwargs["last_sampled"] if "last_sampled" in kwargs else args[6]
    states = self.req_states
    for row, slot in enumerate(input_batch.idx_mapping.tolist()):
        tokens = states.all_token_ids.gpu[slot, : int(states.total_len.gpu[slot])].tolist()
        drafts[row] = last_sampled.view(-1)[slot]
        following = _following(tokens, self.min_n, self.max_n, drafts.shape[1])
        drafts[row, : len(following)] = torch.tensor(following, dtype=drafts.dtype)
    return drafts


def _following(tokens: list[int], min_n: int, max_n: int, count: int) -> list[int]:
    """Up to `count` tokens after the latest earlier occurrence of the last n, for the largest n that has one."""
    for n in range(min(max_n, len(tokens) - 1), min_n - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return tokens[start + n : start + n + count]
    return []
