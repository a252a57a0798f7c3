"""LoRA adapters and drafts beside a reduction: a row keeps its request's adapter, and drafts change no answer."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ficoco_vllm.benchmarks.soak.engine.adapters import write_adapter
from tests.decoder import window_calls
from tests.decoder.calls import Ask
from tests.decoder.test_reference import LAYERS
from tests.decoder.test_reference import left as left_of
from tests.reference.algorithm2 import ReferenceDecoder, Shown
from tests.support.engine import PROMPT, TEXT_ONLY
from tests.support.remote import Host, Remote

TOLERANCE = 1e-3

pytestmark = [pytest.mark.compat, pytest.mark.engine]


@dataclass
class Adapter:
    """A random adapter, and the model whose weights hold it."""

    folder: Path
    merged: Path


def write(model: Path, folder: Path, seed: int) -> Adapter:
    """Write a random adapter of a model."""
    result = Adapter(folder / f"adapter-{seed}", folder / f"merged-{seed}")
    added = write_adapter(model, result.folder, seed)
    weights = load_file(model / "model.safetensors")
    shutil.copytree(model, result.merged)
    merged = {name: weight + added[name] if name in added else weight for name, weight in weights.items()}
    save_file(merged, result.merged / "model.safetensors", {"format": "pt"})
    return result


def test_two_adapters_in_one_batch(
    host: Host, small_llava: Path, tmp_path: Path, images: list[Image.Image]
) -> None:
    """Against the models whose weights hold them; the second time from the prefix cache, which knows adapters."""
    adapters = [write(small_llava, tmp_path, seed) for seed in (1, 2)]
    settings = {"method": "ficoco-l", "keep": 16, "windows": "turn"}
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    engine = host.get(small_llava, settings, block_size=32, max_model_len=512, **options)
    asks = [
        Ask(PROMPT, images[:1], 6),
        Ask(PROMPT, images[1:2], 6, {"ficoco_method": "fastv"}),
        Ask(TEXT_ONLY, [], 6),
    ]
    names = [str(adapter.folder) for adapter in adapters for _ in asks]
    first = engine.call(window_calls.ask_with_adapters, asks * 2, names)
    again = engine.call(window_calls.ask_with_adapters, asks * 2, names)
    assert not any(reply.num_cached for reply in first)
    # Whole blocks of the prompt before its last token.
    assert [reply.num_cached for reply in again] == [
        (reply.num_prompt_tokens - 1) // 32 * 32 for reply in again
    ]
    for replies in (first, again):
        for index, adapter in enumerate(adapters):
            reference = ReferenceDecoder(adapter.merged)
            for one, reply in zip(asks, replies[index * len(asks) :], strict=False):
                method = one.extra.get("ficoco_method", "ficoco-l")
                assert method in LAYERS
                shown = [Shown(image, 144, left_of(method, 144, 16)) for image in one.images]
                logprobs = reference.judge(method, one.prompt, shown, reply.tokens)
                assert logprobs.argmax(dim=-1).tolist() == reply.tokens
                torch.testing.assert_close(reply.logprobs.double(), logprobs, atol=TOLERANCE, rtol=0)
    assert (first[0].logprobs - first[len(asks)].logprobs).abs().max() > 0.1


def test_drafts_change_nothing(
    host: Host, small_llava: Path, small_engine: Remote, images: list[Image.Image]
) -> None:
    """N-grams: drafts that are refused and some that are not, while other requests are reduced."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    settings = {"method": "ficoco-l", "keep": 16, "windows": "turn"}
    engine = host.get(small_llava, settings, block_size=32, max_model_len=512, speculative_config=drafts)
    asks = [
        Ask(PROMPT, images[:1], 24),
        Ask(PROMPT, images[1:2], 3, {"ficoco_method": "fastv"}),
        Ask(TEXT_ONLY, [], 12),
        Ask(PROMPT, images[2:3], 5),
    ]
    expected = small_engine.call(window_calls.ask, asks)
    first, num_drafts = engine.call(window_calls.ask_counting_drafts, asks)
    again, _ = engine.call(window_calls.ask_counting_drafts, asks)
    assert num_drafts > 24
    assert all(reply.num_cached for reply in again)
    for replies in (first, again):
        for reply, one in zip(replies, expected, strict=True):
            assert reply.tokens == one.tokens
            torch.testing.assert_close(reply.logprobs, one.logprobs, atol=1e-4, rtol=0)
