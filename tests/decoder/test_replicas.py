"""Two replicas by vLLM's data parallelism, with the smallest KV cache that starts: the same answers, nothing hangs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from tests.decoder.calls import Ask, ask
from tests.support.remote import Remote
from tests.support.server import Server, data_url, message, serve

# float32 on both sides; the server answers one request at a time, the engine all at once (see test_batches.py)
TOLERANCE = 1e-4
NUM_IMAGES, LONGEST = 3, 512
# A block: keys and values of 32 tokens in float32, 2 heads of 32. The longest prompt takes 16 blocks in each of eight
# groups, and one block is vLLM's own.
KV_BYTES = (8 * LONGEST // 32 + 1) * 32 * 2 * 2 * 32 * 4
QUESTION = "what is this?"
# images, vllm_xargs
ASKED: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (1, {}),
    (1, {"ficoco_method": "fastv", "ficoco_keep": 9}),
    (2, {"ficoco_keep": 64}),
    (1, {"ficoco_keep": 144}),
]
# Requests, visual tokens before reduction (front ends), reductions (worker of each replica).
COUNTED: list[tuple[str, dict[str, str]]] = [
    ("vllm:request_success_total", {"finished_reason": "length"}),
    ("ficoco:visual_tokens_in_total", {}),
    ("ficoco:reduction_seconds_count", {"site": "decoder"}),
]

pytestmark = [pytest.mark.compat, pytest.mark.server, pytest.mark.long]


@pytest.fixture(scope="module")
def server(small_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The step limit is 300 tokens, less than the longest prompt: start-up must raise it."""
    arguments = [str(small_llava), "--ficoco-method", "ficoco-l", "--ficoco-keep", "16", "--enforce-eager"]
    arguments += [
        "--ficoco-config",
        '{"windows": "off"}',
        "--served-model-name",
        "small",
        "--dtype",
        "float32",
        "--block-size",
        "32",
    ]
    arguments += ["--max-model-len", str(LONGEST), "--max-num-batched-tokens", "300", "--max-num-seqs", "8"]
    arguments += ["--limit-mm-per-prompt", json.dumps({"image": NUM_IMAGES})]
    arguments += ["--kv-cache-memory-bytes", str(KV_BYTES), "--data-parallel-size", "2"]
    with serve(tmp_path_factory.mktemp("replicas") / "log", *arguments) as server:
        yield server


def chat(server: Server, images: list[Image.Image], replica: int, text: str = QUESTION, **body: Any) -> Any:
    """One greedy chat with the replica of that number."""
    with server.client() as client:
        return client.chat.completions.create(
            model="small",
            messages=[message(text, [data_url(image) for image in images])],
            temperature=0,
            extra_headers={"X-data-parallel-rank": str(replica)},
            **({"max_tokens": 3, "extra_body": {"ignore_eos": True}} | body),
        )


def by_engine(server: Server, name: str, **labels: str) -> dict[str, float]:
    """A metric, added up for each engine."""
    result: dict[str, float] = {}
    for line in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines():
        if line.startswith(f"{name}{{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
            engine = line.split('engine="')[1].split('"')[0]
            result[engine] = result.get(engine, 0.0) + float(line.rsplit(" ", 1)[1])
    return result


def test_each_replica_answers_as_one_engine_alone(
    server: Server, small_engine: Remote, images: list[Image.Image]
) -> None:
    asks = [
        Ask("USER: " + "<image>\n" * count + f"{QUESTION} ASSISTANT:", images[:count], 3, extra)
        for count, extra in ASKED
    ]
    expected = small_engine.call(ask, asks)
    before = [by_engine(server, name, **labels) for name, labels in COUNTED]
    for replica in range(2):
        for (count, extra), one in zip(ASKED, expected, strict=True):
            body = {"vllm_xargs": extra, "return_token_ids": True, "ignore_eos": True}
            answer = chat(server, images[:count], replica, logprobs=True, extra_body=body)
            assert answer.usage.prompt_tokens == one.num_prompt_tokens
            assert answer.choices[0].model_extra["token_ids"] == one.tokens
            result = [entry.logprob for entry in answer.choices[0].logprobs.content]
            assert result == pytest.approx(one.logprobs.max(dim=-1).values.tolist(), abs=TOLERANCE)
    grown = [
        {engine: value - old.get(engine, 0.0) for engine, value in by_engine(server, name, **labels).items()}
        for (name, labels), old in zip(COUNTED, before, strict=True)
    ]
    each = [len(ASKED), 144 * 5, 3]
    assert grown == [{"0": count, "1": count} for count in each]
    assert by_engine(server, "ficoco:kv_blocks_held") == {"0": 0.0, "1": 0.0}


@pytest.mark.parametrize(
    ("num_images", "text", "words"),
    [
        (NUM_IMAGES + 1, QUESTION, f"At most {NUM_IMAGES} image(s)"),
        (NUM_IMAGES, "a" * 100, f"maximum context length ({LONGEST})"),
        (0, "a" * LONGEST, f"{LONGEST} tokens"),
    ],
    ids=["too many images", "too long with images", "too long without"],
)
def test_what_could_never_be_scheduled_is_refused(
    server: Server, images: list[Image.Image], num_images: int, text: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, images[:num_images], 0, text)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["code"] == 400
    assert words in caught.value.body["message"], caught.value.body
    assert server.is_healthy()


@pytest.mark.parametrize(("keep", "num_tokens"), [(144, 5), (9, 5), (144, 100)])
def test_the_longest_that_is_accepted_is_answered(
    server: Server, images: list[Image.Image], keep: int, num_tokens: int
) -> None:
    """All images that are allowed, text up to the last token: with every block of the cache, or nearly none.

    An answer for which there is too little room ends at the last position.
    """
    room = LONGEST - NUM_IMAGES * 144 - len("USER: " + "\n" * NUM_IMAGES + " ASSISTANT:")
    answer = chat(
        server,
        images[:NUM_IMAGES],
        1,
        "a" * (room - 5),
        max_tokens=num_tokens,
        extra_body={"vllm_xargs": {"ficoco_keep": keep}, "ignore_eos": True},
    )
    assert answer.usage.total_tokens == LONGEST


def test_log_probabilities_of_a_prompt_of_text(server: Server) -> None:
    """Nothing is reduced, so `echo` with `logprobs` is right: each token has the one with which it was generated."""
    prompt = list(range(40, 70))
    generated = complete(server, prompt, echo=False)
    token, logprob = generated.model_extra["token_ids"][0], generated.logprobs.token_logprobs[0]
    echoed = complete(server, [*prompt, token], echo=True).logprobs.token_logprobs
    assert len(echoed) == len(prompt) + 2
    assert all(value < 0 for value in echoed[1:])
    assert echoed[len(prompt)] == pytest.approx(logprob, abs=TOLERANCE)


def complete(server: Server, prompt: list[int], echo: bool) -> Any:
    """One token after a prompt of text, with log-probabilities."""
    with server.client() as client:
        answer = client.completions.create(
            model="small",
            prompt=prompt,
            max_tokens=1,
            echo=echo,
            logprobs=1,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
    return answer.choices[0]
