"""Greedy sampling by torch, and everything else by vLLM's sampler."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.sampler import Sampler

from ficoco_vllm.decoder.sampler import GreedySampler
from ficoco_vllm.decoder.state import DecoderModelState

pytestmark = pytest.mark.compat

DRAWN = torch.tensor([7, 7])


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> GreedySampler:
    """A sampler with one temperature of 0.5 at state 1, whose kernel always samples token 7."""
    built = Sampler.__new__(Sampler)
    temperature: Any = SimpleNamespace(np=np.array([0.0, 0.5, 0.0], dtype=np.float32))
    monkeypatch.setattr(built, "sampling_states", SimpleNamespace(temperature=temperature), raising=False)

    def draw(self: Sampler, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return DRAWN, logits

    monkeypatch.setattr(Sampler, "_sample_random", draw)
    return GreedySampler(built)


def sample(sampler: GreedySampler, logits: Tensor, states: list[int]) -> Tensor:
    rows = torch.tensor(states)
    sampled, same = sampler._sample_random(logits, rows, np.array(states), rows, None, None, False)
    assert same is logits
    return sampled


def test_greedy_requests_get_the_likeliest_token_and_the_first_of_equals(sampler: GreedySampler) -> None:
    logits = torch.zeros(2, 2000)
    logits[0, 1500] = 1.0
    logits[1, [300, 1200]] = 2.0
    assert sample(sampler, logits, [2, 0]).tolist() == [1500, 300]


def test_a_batch_with_one_that_draws_goes_to_the_kernel(sampler: GreedySampler) -> None:
    assert sample(sampler, torch.zeros(2, 10), [0, 1]) is DRAWN


def test_a_sampler_of_another_kind_is_left_alone() -> None:
    class Own(Sampler):
        pass

    state = DecoderModelState.__new__(DecoderModelState)
    state.device = torch.device("cpu")
    assert state.custom_sampler(Own.__new__(Own)) is None
