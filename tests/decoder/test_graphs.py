"""Decoding in CUDA graphs after reductions equals an eager engine: on a CPU, with noted calls for graphs.

What replays are the captured operators on the captured memory, so what a step computes outside of that memory is not
seen: such faults are planted below. What only a GPU shows is in docs/untested.md.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from torch import Tensor
from vllm import LLM

from ficoco_vllm.decoder.later_steps import LaterSteps, Rows
from tests.decoder import calls, window_calls
from tests.decoder.calls import Ask
from tests.decoder.test_batches import OPTIONS, TOLERANCE, mixed
from tests.decoder.window_calls import Reply
from tests.support import graph_engine
from tests.support.engine import TEXT_ONLY
from tests.support.graph_engine import emulate, noting_steps
from tests.support.remote import Host, Remote, remote_engine

# As served by default: prompts in pieces, prefix caching.
FICOCO = {"method": "ficoco-l", "keep": 16, "windows": "turn"}
ROOM = {**OPTIONS, "max_num_batched_tokens": 400}
# Six requests at most, so that others wait for those that leave.
SEQS, SIZES = 6, (1, 3, 5)
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
DECODE: dict[str, Any] = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [*SIZES],
}
# vLLM's default on a GPU: pieces between the attentions for all other steps. Dynamo cuts them, nothing compiles them.
PIECES: dict[str, Any] = {
    "mode": 3,
    "backend": "eager",
    "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},
    "cudagraph_mode": "FULL_AND_PIECEWISE",
    "cudagraph_capture_sizes": [*SIZES, 64, 256, 512],
}

pytestmark = [pytest.mark.compat, pytest.mark.engine, pytest.mark.long]


def requests(images: list[Image.Image]) -> list[Ask]:
    """Text, one image and two, methods and budgets mixed; then texts, one of which ends after the other."""
    return [*mixed(images, 16), *(Ask(TEXT_ONLY, [], num_tokens) for num_tokens in range(8, 8 + 4 * SEQS, 4))]


def start(model: Path, compilation: dict[str, Any], **more: Any) -> Any:
    """An engine with graphs in a process of its own."""
    options = {
        **ROOM,
        "max_num_seqs": SEQS,
        "enforce_eager": False,
        "compilation_config": compilation,
        **more,
    }
    # Threads of several processes would spin while they wait for each other.
    environment = {"OMP_NUM_THREADS": "1", "VLLM_DISABLE_COMPILE_CACHE": "1"}
    return remote_engine(model, FICOCO, environment, emulate, **options)


@pytest.fixture(scope="module")
def decoding(small_llava: Path) -> Iterator[Remote]:
    """Graphs of decoding steps."""
    with start(small_llava, DECODE) as engine:
        yield engine


@pytest.fixture(scope="module")
def eager(host: Host, small_llava: Path, images: list[Image.Image]) -> list[Reply]:
    """Answers of an engine without graphs, with vLLM's attention for CPUs."""
    return host.get(small_llava, FICOCO, **ROOM).call(window_calls.ask, requests(images), True)


def check(answers: list[Reply], eager: list[Reply]) -> None:
    """Equal tokens, and log-probabilities but for rounding."""
    for answer, expected in zip(answers, eager, strict=True):
        assert answer.tokens == expected.tokens
        torch.testing.assert_close(answer.logprobs, expected.logprobs, atol=TOLERANCE, rtol=0)


def test_replayed_decoding_equals_eager(
    decoding: Remote, images: list[Image.Image], eager: list[Reply]
) -> None:
    """Requests join and leave, and some are preempted; then again, with prefixes from the cache."""
    assert decoding.call(graph_engine.num_graphs) == len(SIZES)
    cached = []
    for _ in range(2):
        (answers, preempted), steps, replays = decoding.call(
            noting_steps, calls.ask_noting_preemptions, requests(images), window_calls.ask
        )
        check(answers, eager)
        replayed = [step for step in steps if step.mode == "FULL"]
        assert len(replayed) == replays
        assert {(step.num_reqs, step.num_padded_reqs) for step in replayed} == {
            (1, 1),
            (2, 3),
            (3, 3),
            (4, 5),
            (5, 5),
        }
        assert not any(step.reduces for step in replayed)
        assert any(step.mode == "NONE" and step.num_reqs == step.num_tokens == SEQS for step in steps)
        assert any(step.reduces and step.num_reqs > 1 for step in steps)
        assert any(preempted)
        cached.append(sum(answer.num_cached for answer in answers))
    assert cached[0] < cached[1]


@contextmanager
def slots_elsewhere() -> Iterator[None]:
    """The fifth segment's slots are written to memory that each step allocates."""
    rewrite = LaterSteps._rewrite_slots

    def elsewhere(self: LaterSteps, *args: Any) -> Tensor:
        slot_mappings = args[-1]
        known, before = slot_mappings[4], slot_mappings[4].clone()
        places = rewrite(self, *args)
        known.copy_(before)
        return places

    with patch.object(LaterSteps, "_rewrite_slots", elsewhere):
        yield


@contextmanager
def lengths_elsewhere() -> Iterator[None]:
    """The fifth segment's lengths are read from memory that each step allocates."""
    rows = LaterSteps.rows

    def elsewhere(self: LaterSteps, *args: Any) -> list[Rows]:
        result = rows(self, *args)
        result[4] = replace(result[4], seq_lens=result[4].seq_lens.clone())
        return result

    with patch.object(LaterSteps, "rows", elsewhere):
        yield


@contextmanager
def bound_of_capture() -> Iterator[None]:
    """The longest sequence is an integer of the host; the capture takes that of its dummy requests."""
    from ficoco_vllm.decoder.state import DecoderModelState

    prepare = DecoderModelState.prepare_attn

    def bounded(
        self: DecoderModelState, *args: Any, for_capture: bool = False, **more: Any
    ) -> dict[str, Any]:
        return prepare(self, *args, **more)

    with patch.object(DecoderModelState, "prepare_attn", bounded):
        yield


def ask_with(engine: LLM, fault: Callable[[], AbstractContextManager[None]], asks: list[Ask]) -> list[Reply]:
    """Answers of graphs that were captured and are replayed with a fault."""
    with fault(), graph_engine.captured_again(engine):
        return window_calls.ask(engine, asks)


@pytest.mark.parametrize("fault", [None, slots_elsewhere, lengths_elsewhere, bound_of_capture])
def test_what_a_graph_does_not_know_would_show(
    decoding: Remote,
    images: list[Image.Image],
    eager: list[Reply],
    fault: Callable[[], AbstractContextManager[None]] | None,
) -> None:
    """Negative control."""
    answers = decoding.call(ask_with, fault or nullcontext, requests(images)[:3])
    with pytest.raises(AssertionError) if fault else nullcontext():
        check(answers, eager[:3])


def test_replayed_pieces_equal_eager(
    small_llava: Path, images: list[Image.Image], eager: list[Reply]
) -> None:
    """Steps with prompts replay pieces as well; those that reduce replay none, in rows filled up for them."""
    with start(small_llava, PIECES) as engine:
        answers, steps, replays = engine.call(noting_steps, window_calls.ask, requests(images))
    check(answers, eager)
    by_mode = {mode: [step for step in steps if step.mode == mode] for mode in ("FULL", "PIECEWISE", "NONE")}
    assert by_mode["FULL"]
    pieces = by_mode["PIECEWISE"]
    assert any(step.reduces and step.num_tokens < step.num_padded_tokens for step in pieces)
    others = [step for step in pieces if not step.reduces]
    assert any(step.num_tokens < step.num_padded_tokens for step in others)
    num_pieces, rest = divmod(replays - len(by_mode["FULL"]), len(others))
    assert (num_pieces > 0, rest) == (True, 0)


def test_replayed_drafts_equal_eager(
    small_llava: Path, images: list[Image.Image], eager: list[Reply]
) -> None:
    """Decoding steps of four tokens a request, some of which are refused."""
    compilation = DECODE | {"cudagraph_capture_sizes": [4 * size for size in SIZES]}
    with start(small_llava, compilation, speculative_config=DRAFTS) as engine:
        answers, steps, replays = engine.call(noting_steps, window_calls.ask, requests(images))
    check(answers, eager)
    replayed = [step for step in steps if step.mode == "FULL"]
    assert len(replayed) == replays > 0
    assert {step.num_tokens // step.num_reqs for step in replayed} == {4}
    assert any(step.num_reqs < step.num_padded_reqs for step in replayed)
