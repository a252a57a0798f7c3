"""The question of a chat about its images, as a chat names it and as a server reads it."""

from typing import Any

import pytest
from openai import OpenAI
from PIL import Image

from ficoco_vllm.server.request_field.question import question_of
from tests.support.server import Server, data_url, message

IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def text(words: str, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": words}


def turn(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


@pytest.mark.parametrize(
    ("messages", "question"),
    [
        ([turn(IMAGE, text("what is it?"))], "what is it?"),
        ([turn(text("look:"), IMAGE, text("what is it?"))], "look:\nwhat is it?"),
        ([turn({"type": "input_image"}, text("what?", "input_text"))], "what?"),
        ([turn({"image_url": "data:"}, "what?")], "what?"),
        ([{"role": "system", "content": "be brief"}, turn(IMAGE, text("what?"))], "what?"),
        ([{"role": "system", "content": "be brief"}, turn(IMAGE)], None),
        ([turn(IMAGE), turn(text("sure"), role="assistant"), turn(text("what?"))], "what?"),
        ([turn(IMAGE), turn(text("what?"))], "what?"),
        ([{"role": "user", "content": "what is this?"}, turn(IMAGE)], "what is this?"),
        ([turn(IMAGE, text("first?")), turn(text("then?"))], "first?"),
        ([turn(IMAGE, text("first?")), turn(IMAGE, text("second?"))], "second?"),
        ([turn(IMAGE)], None),
        ([turn(text("no image"))], None),
        ([{"role": "user", "content": None}, {"role": "assistant"}, "odd"], None),
        ([], None),
    ],
)
def test_the_question_is_the_text_beside_the_last_image(messages: list[Any], question: str | None) -> None:
    assert question_of(messages) == question


def ask(client: OpenAI, messages: list[Any], **extra: Any) -> tuple[Any, list[float]]:
    """The reported usage, and the log-probabilities of the answer's tokens."""
    answer = client.chat.completions.create(
        model="ficoco-demo", messages=messages, temperature=0, max_tokens=4, logprobs=True, extra_body=extra
    )
    assert answer.usage is not None
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    scores = [token.logprob for token in answer.choices[0].logprobs.content]
    return (answer.usage.model_extra or {})["ficoco"], scores


@pytest.mark.compat
@pytest.mark.server
@pytest.mark.parametrize("method", ["trim", "cdpruner", "recoverable"])
def test_a_server_reads_it(client: OpenAI, images: list[Image.Image], method: str) -> None:
    """As an argument of the processor names it."""
    chosen, asked = (
        {"method": method, "keep": 32},
        [message("what number is on the sign?", [data_url(images[2])])],
    )
    usage, scores = ask(client, asked, ficoco=chosen)
    assert (usage["method"], usage["visual_tokens_kept"]) == (method, 32)
    raw = {"ficoco_method": method, "ficoco_keep": 32}
    named = {**raw, "ficoco_question": "what number is on the sign?"}
    assert ask(client, asked, mm_processor_kwargs=named)[1] == pytest.approx(scores, abs=1e-4)
    assert ask(client, asked, mm_processor_kwargs=raw)[1] == pytest.approx(scores, abs=1e-4)
    other = {**raw, "ficoco_question": "is there a blue circle in the lower half of this image?"}
    assert ask(client, asked, mm_processor_kwargs=other)[1] != pytest.approx(scores, abs=1e-3)


@pytest.mark.compat
@pytest.mark.server
def test_later_turns_find_the_image_and_other_questions_do_not(
    server: Server, client: OpenAI, images: list[Image.Image]
) -> None:
    """192 tokens fill a block of 128."""
    image = Image.new("RGB", (64, 64), (3, 141, 59))

    def hits(messages: list[Any]) -> float:
        before = server.metric("vllm:prefix_cache_hits_total")
        ask(client, messages, ficoco={"method": "trim", "keep": 192})
        return server.metric("vllm:prefix_cache_hits_total") - before

    first = message("what color is the image?", [data_url(image)])
    assert hits([first]) == 0
    later = [first, {"role": "assistant", "content": "green"}, message("is it a circle?", [])]
    assert hits(later) == 128
    assert hits([message("is there a shape in it?", [data_url(image)])]) == 0
