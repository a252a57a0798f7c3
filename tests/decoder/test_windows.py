"""Decision windows in the engine: a prefix cache that finds whole turns, and steps that hold parts of a prompt.

A request that finds tokens in the cache must be answered as if it computed them all; the number of cached tokens is
asserted, so that a cache that never finds any fails.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ficoco_vllm.reduction import available
from tests.decoder import calls, window_calls
from tests.decoder.calls import Ask
from tests.decoder.test_reference import LAYERS
from tests.decoder.test_reference import left as left_of
from tests.decoder.window_calls import Reply
from tests.reference.algorithm2 import ReferenceDecoder, Shown
from tests.support.remote import Host, Remote, remote_engine

PATCHES, BLOCK = 144, 32
SETTINGS = {"method": "ficoco-l", "keep": 16, "explain": True, "windows": "turn"}
# One token a character, except for the special ones.
SYSTEM = "<s>A chat about signs; the answers are short, polite and helpful. "
FIRST = SYSTEM + "USER: <image>\nwhat number is on the sign? ASSISTANT:"
SECOND = FIRST + " 17 </s>USER: and which colour does it have, please? ASSISTANT:"
THIRD = SECOND + " red </s>USER: <image>\nare there more signs here? ASSISTANT:"
FOURTH = THIRD + " two </s>USER: really? please look again. ASSISTANT:"
FIFTH = FOURTH + " two </s>USER: and what about the first one? ASSISTANT:"
TWO = FIRST.replace("<image>", "<image> <image>")
TEXT = SYSTEM + "USER: is there a red sign? ASSISTANT:"
# The same arithmetic in another order; a fault moves log-probabilities by more than a tenth.
TOLERANCE = 1e-5

pytestmark = [pytest.mark.compat, pytest.mark.engine]


def length(prompt: str) -> int:
    """Tokens of a prompt with its placeholders."""
    text = prompt.replace("<s>", ".").replace("</s>", ".")
    return len(text.replace("<image>", "." * PATCHES))


def blocks(prompt: str) -> int:
    """Tokens of the whole blocks of a prompt."""
    return length(prompt) // BLOCK * BLOCK


def assert_equal(replies: list[Reply], expected: list[Reply]) -> None:
    """The same answers."""
    for reply, one in zip(replies, expected, strict=True):
        assert reply.tokens == one.tokens
        torch.testing.assert_close(reply.logprobs, one.logprobs, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def engine(host: Host, small_llava: Path) -> Remote:
    """Steps that hold any prompt of these tests."""
    return host.get(small_llava, SETTINGS, block_size=BLOCK, max_model_len=1024)


@pytest.fixture
def empty(engine: Remote) -> Remote:
    """The engine with an empty prefix cache."""
    assert engine.call(window_calls.reset)
    return engine


def turn(prompt: str, images: list[Image.Image], count: int, ends: list[str], **extra: Any) -> Ask:
    """A request whose windows end with these prompts."""
    return Ask(prompt, images[:count], 6, {"ficoco_window": [length(end) for end in ends], **extra})


def cases(images: list[Image.Image]) -> list[tuple[Ask, int]]:
    """Requests to send one after the other, and the tokens of each that are cached by then."""
    first = turn(FIRST, images, 1, [FIRST])
    system = length(SYSTEM + "USER: ") // BLOCK * BLOCK
    return [
        (first, 0),
        (first, blocks(FIRST)),
        (turn(SECOND, images, 1, [FIRST]), blocks(FIRST)),
        (turn(SECOND, images, 1, [FIRST]), blocks(SECOND)),
        (turn(THIRD, images, 2, [FIRST, THIRD]), blocks(SECOND)),
        (turn(FOURTH, images, 2, [FIRST, THIRD]), blocks(THIRD)),
        (turn(FIFTH, images, 2, [FIRST, THIRD]), blocks(FOURTH)),
        # Anything else that decides: what is left is text before the image.
        (turn(FIRST.replace("number", "colour"), images, 1, [FIRST]), system),
        (turn(SECOND, images, 1, [SECOND]), system),
        (turn(FIRST, images, 1, [FIRST], ficoco_keep=80), system),
        # The blocks that a smaller budget needs are all there, with another content.
        (turn(FIRST, images, 1, [FIRST], ficoco_keep=48), system),
        (turn(FIRST, images, 1, [FIRST], ficoco_method="fastv"), system),
        (turn(FIRST, images[1:], 1, [FIRST]), system),
        (turn(FIRST, images, 1, [FIRST], ficoco_keep=PATCHES), system),
        (Ask(TEXT, [], 6), system),
        (Ask(TEXT, [], 6), blocks(TEXT)),
        # Two images of one turn share a window.
        (turn(TWO, images, 2, []), system),
        (turn(TWO, images, 2, []), blocks(TWO)),
    ]


def warm_and_cold(engine: Remote, asked: list[tuple[Ask, int]]) -> tuple[list[Reply], list[Reply]]:
    """Answers from the cache, whose hits are asserted, and without it."""
    asks = [one for one, _ in asked]
    warm = engine.call(window_calls.ask_each, asks)
    assert [reply.num_prompt_tokens for reply in warm] == [length(one.prompt) for one in asks]
    assert [reply.num_cached for reply in warm] == [cached for _, cached in asked]
    cold = engine.call(window_calls.ask_each, asks, True)
    assert [reply.num_cached for reply in cold] == [0] * len(asks)
    return warm, cold


def test_turns_equal_cold_ones(empty: Remote, images: list[Image.Image]) -> None:
    assert_equal(*warm_and_cold(empty, cases(images)))


@pytest.mark.long
def test_turns_equal_cold_ones_bit_for_bit_on_one_thread(
    small_llava: Path, images: list[Image.Image]
) -> None:
    """With one thread the sums of a row do not depend on the other rows of a step.

    A CPU's matrix products may do otherwise. Requests that keep all tokens, which vLLM's own cache serves, show it.
    """
    options = {"block_size": BLOCK, "max_model_len": 1024}
    whole = [turn(prompt, images, 1, [FIRST], ficoco_keep=PATCHES) for prompt in (FIRST, FIRST, SECOND)]
    with remote_engine(small_llava, SETTINGS, {"OMP_NUM_THREADS": "1"}, **options) as engine:
        warm, cold = warm_and_cold(engine, cases(images))
        own = [engine.call(window_calls.ask_each, whole, is_cold) for is_cold in (False, True)]
    if equal_bits(*own):
        assert equal_bits(warm, cold)
    assert_equal(warm, cold)


def equal_bits(left: list[Reply], right: list[Reply]) -> bool:
    """Whether all log-probabilities are the same numbers."""
    return all(torch.equal(one.logprobs, other.logprobs) for one, other in zip(left, right, strict=True))


def test_a_cached_turn_equals_its_tokens_forced_upon_an_engine_without_windows(
    empty: Remote, small_engine: Remote, images: list[Image.Image]
) -> None:
    """The oracle, without caches and windows, is forced to answer the first turn with the second one."""
    first, second = (turn(prompt, images, 1, [FIRST]) for prompt in (FIRST, SECOND))
    empty.call(window_calls.ask, [first])
    (reply,) = empty.call(window_calls.ask, [second])
    assert reply.num_cached == blocks(FIRST)
    tokens, logprobs = small_engine.call(window_calls.force, Ask(FIRST, images[:1], 6), SECOND)
    assert tokens == reply.tokens
    torch.testing.assert_close(reply.logprobs, logprobs, atol=TOLERANCE, rtol=0)


def test_without_rounding_no_turn_is_found(empty: Remote, images: list[Image.Image]) -> None:
    """Negative control of the number of cached tokens: 20 of 144 tokens are left by multiples of a block, or not."""
    one = turn(FIRST, images, 1, [FIRST], ficoco_keep=20)
    (_, again) = empty.call(window_calls.ask_each, [one, one])
    assert again.num_cached == blocks(FIRST)
    warm, _ = empty.call(window_calls.ask_mutant, "no rounding", [one, one])
    assert warm[-1].num_cached == length(SYSTEM + "USER: ") // BLOCK * BLOCK


def test_what_is_read_from_the_cache_decides_as_what_is_computed(
    empty: Remote, small_llava: Path, images: list[Image.Image]
) -> None:
    """Every method, with its image after cached text, against the plain reference in float64."""
    reference = ReferenceDecoder(small_llava)
    methods = list(LAYERS)
    extras = [{"ficoco_method": method, "ficoco_keep": 16} for method in methods]
    asks = [turn(SECOND, images, 1, [FIRST], **extra) for extra in extras]
    replies = empty.call(
        window_calls.ask_each, [turn(FIRST, images, 1, [FIRST], **extra) for extra in extras]
    )
    later = empty.call(window_calls.ask_each, asks)
    system = length(SYSTEM + "USER: ") // BLOCK * BLOCK
    assert [reply.num_cached for reply in replies] == [0, *[system] * (len(methods) - 1)]
    assert [reply.num_cached for reply in later] == [blocks(FIRST)] * len(methods)
    for method, one, reply in zip(methods, asks, later, strict=True):
        # The counts of geometric schedules, 69 and 33 of 144, leave in multiples of a block: 80 and 48.
        left = {layer: rounded(count) for layer, count in left_of(method, PATCHES, 16).items()}
        shown = Shown(one.images[0], PATCHES, left, end=length(FIRST))
        logprobs = reference.judge(method, SECOND, [shown], reply.tokens)
        assert logprobs.argmax(dim=-1).tolist() == reply.tokens
        torch.testing.assert_close(reply.logprobs.double(), logprobs, atol=1e-3, rtol=0)
        whole = replace(shown, end=None)
        assert (reference.judge(method, SECOND, [whole], reply.tokens) - logprobs).abs().max() > 1e-2


def test_methods_without_a_reference(empty: Remote, images: list[Image.Image]) -> None:
    """The other methods that a server of the decoder runs."""
    extras = [{"ficoco_method": method, "ficoco_keep": 16} for method in available("decoder")]
    extras = [extra for extra in extras if extra["ficoco_method"] not in LAYERS]
    assert extras
    for prompt in (FIRST, SECOND):
        asks = [turn(prompt, images, 1, [FIRST], **extra) for extra in extras]
        warm = empty.call(window_calls.ask_each, asks)
        if prompt == SECOND:
            assert [reply.num_cached for reply in warm] == [blocks(FIRST)] * len(asks)
        assert_equal(warm, empty.call(window_calls.ask_each, asks, True))


def test_tower_and_decoder(host: Host, small_llava: Path, images: list[Image.Image]) -> None:
    """FiCoCo-VL: the tower leaves 80 tokens of an image; one of another budget there is another image."""
    settings = {"method": "ficoco-vl", "keep": 16, "encoder": {"keep": 80}, "windows": "turn"}
    engine = host.get(small_llava, settings, block_size=BLOCK, max_model_len=1024)
    assert engine.call(window_calls.reset)
    system = length(SYSTEM + "USER: ") // BLOCK * BLOCK
    first, second = ((length(prompt) - PATCHES + 80) // BLOCK * BLOCK for prompt in (FIRST, SECOND))
    cases: list[tuple[Ask, int]] = [
        (Ask(FIRST, images[:1], 6), 0),
        (Ask(FIRST, images[:1], 6), first),
        (Ask(SECOND, images[:1], 6), first),
        (Ask(SECOND, images[:1], 6), second),
        (Ask(FIRST, images[:1], 6, mm={"ficoco_keep": 112}), system),
        (Ask(FIRST, images[:1], 6, mm={"ficoco_method": "divprune"}), system),
    ]
    asks = [one for one, _ in cases]
    warm = engine.call(window_calls.ask_each, asks)
    assert [reply.num_cached for reply in warm] == [cached for _, cached in cases]
    assert_equal(warm, engine.call(window_calls.ask_each, asks, True))


def rounded(count: int) -> int:
    """Visual tokens that are left where multiples of a block leave."""
    return PATCHES - round((PATCHES - count) / BLOCK) * BLOCK


def test_a_single_turn_is_what_it_is_without_windows(
    empty: Remote, small_engine: Remote, images: list[Image.Image]
) -> None:
    """Bit for bit, where the counts are multiples of a block."""
    one = Ask(FIRST, images[:1], 6)
    (with_windows,) = empty.call(calls.ask, [one])
    (without,) = small_engine.call(calls.ask, [one])
    assert with_windows.tokens == without.tokens
    assert torch.equal(with_windows.logprobs, without.logprobs)


def test_a_chat_finds_its_earlier_turns(empty: Remote, images: list[Image.Image]) -> None:
    """Nothing said about windows: they end with the chat template's generation prompt."""
    turns = [
        ("what number is on the sign that stands on the left?", images[0]),
        ("and which colour does it have?", None),
        ("what about this one, is it the same?", images[1]),
        ("are you sure?", None),
    ]
    replies = empty.call(window_calls.chat, turns, 12)
    lengths = [warm.num_prompt_tokens for warm, _ in replies]
    # All of the earlier turn's prompt, at least; its answer may be tokenized in another way.
    for (warm, cold), before, now in zip(replies, [0, *lengths], lengths, strict=False):
        assert before // BLOCK * BLOCK <= warm.num_cached < now
        assert cold.num_cached == 0
        assert_equal([warm], [cold])


def test_several_answers_and_salts(empty: Remote, images: list[Image.Image]) -> None:
    one = turn(FIRST, images, 1, [FIRST])
    answers, cached = empty.call(window_calls.samples, one, 3)
    again, cached_again = empty.call(window_calls.samples, one, 3)
    assert answers == again
    assert len({tuple(tokens) for tokens in answers}) > 1
    assert cached_again == blocks(FIRST)
    assert cached in (0, blocks(FIRST))  # the second answer may find what the first has computed
    (salted,) = empty.call(window_calls.ask, [one], False, "a tenant")
    (other,) = empty.call(window_calls.ask, [one], False, "another tenant")
    (same,) = empty.call(window_calls.ask, [one], False, "a tenant")
    assert [salted.num_cached, other.num_cached, same.num_cached] == [0, 0, blocks(FIRST)]
    assert_equal([salted, other], [same, same])


def test_hits_are_in_the_statistics_of_vllm(empty: Remote, images: list[Image.Image]) -> None:
    asks = [turn(FIRST, images, 1, [FIRST]), turn(SECOND, images, 1, [FIRST])]
    queries, hits = empty.call(window_calls.prefix_statistics, asks)
    assert queries == length(FIRST) + length(SECOND)
    assert hits == blocks(FIRST)


def test_a_block_that_was_evicted_from_one_segment_is_missed_in_all(
    empty: Remote, images: list[Image.Image]
) -> None:
    one = turn(FIRST, images, 1, [FIRST])
    (first,) = empty.call(window_calls.ask, [one])
    free = empty.call(calls.free_blocks)
    # The block that ends after the image; what is left is text before it.
    empty.call(window_calls.evict_one, 5, (blocks(FIRST) - 64) // BLOCK - 1)
    (again,) = empty.call(window_calls.ask, [one])
    assert again.num_cached == length(SYSTEM + "USER: ") // BLOCK * BLOCK
    assert_equal([again], [first])
    assert empty.call(calls.free_blocks) == free


def test_traced_requests_are_computed(empty: Remote, images: list[Image.Image]) -> None:
    """A cached window leaves no trace, so the cache is passed over."""
    one = turn(FIRST, images, 1, [FIRST])
    (first,) = empty.call(window_calls.ask, [one])
    (traced,) = empty.call(window_calls.ask, [turn(FIRST, images, 1, [FIRST], ficoco_trace=5)])
    assert traced.num_cached == 0
    assert empty.call(calls.take_trace, 5)
    assert_equal([traced], [first])


@pytest.mark.parametrize(
    ("mutant", "prompts"),
    [
        ("window not hashed", [(FIRST, [FIRST]), (SECOND, [SECOND])]),
        ("prefix keys zeroed", [(TEXT, []), (FIRST, [FIRST])]),
        # Lookups of one length agree with it by themselves; a longer one finds wrong blocks.
        ("identity mapping", [(FIRST, [FIRST]), (THIRD, [FIRST, THIRD]), (FOURTH, [FIRST, THIRD])]),
    ],
)
def test_the_comparison_notices_a_fault(
    engine: Remote, images: list[Image.Image], mutant: str, prompts: list[tuple[str, list[str]]]
) -> None:
    """Negative controls: an answer that finds tokens differs from one that computes them."""
    asks = [
        Ask(prompt, [], 6) if prompt == TEXT else turn(prompt, images, prompt.count("<image>"), ends)
        for prompt, ends in prompts
    ]
    warm, cold = engine.call(window_calls.ask_mutant, mutant, asks)
    assert warm[-1].num_cached > 0
    assert any(
        (one.logprobs - other.logprobs).abs().max() > 0.05 for one, other in zip(warm, cold, strict=True)
    )


def test_prompts_in_chunks_equal_those_in_one_step(empty: Remote, images: list[Image.Image]) -> None:
    """Text before a window and after it is computed in pieces, a window never."""
    long = SYSTEM.removeprefix("<s>") * 5
    late = "<s>" + long + FIRST.removeprefix("<s>")
    early = FIRST + " 17 </s>USER: " + long + "ASSISTANT:"
    asks = [
        turn(late, images, 1, [late]),
        turn(early, images[1:], 1, [FIRST]),
        turn(FOURTH, images[2:], 2, [FIRST, THIRD]),
        Ask("<s>" + long * 2, [], 6),
        turn(FIRST, images[3:], 1, [FIRST], ficoco_keep=PATCHES),
    ]
    whole = empty.call(window_calls.ask_each, asks, True)
    longest = length(FIRST) - length(SYSTEM + "USER: ")
    for most in (longest, longest + 20):
        alone = [empty.call(window_calls.ask_in_steps, [one], most) for one in asks]
        assert_equal([reply for (reply,), _ in alone], whole)
        # The prompt's tokens, in steps; the last one computes the first token of the answer.
        sizes = [[next(iter(step.values())) for step in steps] for _, steps in alone]
        assert all(max(size) <= most for size in sizes)
        window = length(late) - length("<s>" + long + SYSTEM.removeprefix("<s>") + "USER: ")
        assert window in sizes[0] or sum(sizes[0][: sizes[0].index(max(sizes[0])) + 1]) >= length(late)
        assert any(size < window for size in sizes[1][1:])  # text after the window
        together, _ = empty.call(window_calls.ask_in_steps, asks, most)
        assert_equal(together, whole)


def test_cached_and_chunked(empty: Remote, images: list[Image.Image]) -> None:
    """A second turn that computes the end of a cached window and the rest of the prompt in pieces."""
    long = SECOND + SYSTEM.removeprefix("<s>") * 4 + "</s>USER: so? ASSISTANT:"
    first, one = turn(FIRST, images, 1, [FIRST]), turn(long, images, 1, [FIRST])
    empty.call(window_calls.ask, [first])
    (chunked,), steps = empty.call(window_calls.ask_in_steps, [one], 64, False)
    (cold,) = empty.call(window_calls.ask, [one], True)
    assert chunked.num_cached == blocks(FIRST)
    assert len(steps) > (length(long) - blocks(FIRST)) // 64
    assert_equal([chunked], [cold])


def test_the_whole_prompt_may_decide_and_text_before_it_is_reused(
    host: Host, small_llava: Path, small_engine: Remote, images: list[Image.Image]
) -> None:
    """No answer changes: those of a server without windows, whatever was cached or computed in pieces."""
    engine = host.get(small_llava, SETTINGS | {"windows": "prompt"}, block_size=BLOCK, max_model_len=1024)
    asks = [
        Ask(FIRST, images[:1], 6, {"ficoco_keep": 20}),
        Ask(SECOND, images[:1], 6, {"ficoco_keep": 20}),
        Ask(TEXT, [], 6),
        Ask(FIRST, images[1:2], 6, {"ficoco_keep": PATCHES}),
        Ask(FOURTH, images[:2], 6),
        # The same prompt again, whose image loses whole blocks.
        Ask(FOURTH, images[:2], 6),
    ]
    system = length(SYSTEM + "USER: ") // BLOCK * BLOCK
    replies = engine.call(window_calls.ask_each, asks)
    assert [reply.num_cached for reply in replies] == [0, *[system] * 4, blocks(FOURTH)]
    expected = small_engine.call(window_calls.ask_each, asks)
    assert_equal(replies, expected)
    long = SYSTEM + "a" * 200 + FIRST.removeprefix("<s>")
    late = Ask(long, images[:1], 6)
    (chunked,), steps = engine.call(window_calls.ask_in_steps, [late], length(FIRST) - length(SYSTEM))
    assert len(steps) > 6 + 1
    assert_equal([chunked], small_engine.call(window_calls.ask, [late]))


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        ({"ficoco_window": 0}, "ficoco_window = 0 is not allowed; allowed: integers from 1 to"),
        ({"ficoco_window": "100"}, "ficoco_window = '100'"),
        ({"ficoco_window": [length(FIRST) + 1]}, "ficoco_window"),
    ],
)
def test_windows_that_are_refused(
    engine: Remote, images: list[Image.Image], extra: dict[str, Any], part: str
) -> None:
    assert part in engine.call(calls.refusal, Ask(FIRST, images[:1], 1, extra))


def test_without_windows_a_request_may_not_name_any(small_engine: Remote, images: list[Image.Image]) -> None:
    result = small_engine.call(calls.refusal, Ask(FIRST, images[:1], 1, {"ficoco_window": 230}))
    assert "ficoco_window is not a field of this server" in result
