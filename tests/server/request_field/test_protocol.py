"""Except for documented additions vLLM's protocol is unchanged: a plain vLLM server compared with ours."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ficoco_vllm.benchmarks.harness.serving import STOCK
from ficoco_vllm.server.request_field.routes import ROUTES
from tests.support.pictures import noise
from tests.support.server import API_KEY, DTYPE, Server, data_url, message, serve

MODEL = "ficoco-demo"
# Different in every answer, or of the moment.
OF_THE_MOMENT = {"id", "created", "created_at", "completed_at", "request_id", "system_fingerprint", "item_id"}
OUR_HEADERS = {
    "x-ficoco-method",
    "x-ficoco-visual-tokens",
    "x-ficoco-visual-tokens-kept",
    "x-ficoco-kv-bytes-saved",
}

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def plain(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of vLLM itself, without any plugin."""
    log = tmp_path_factory.mktemp("plain") / "log"
    arguments = ["--model", str(demo_model), "--served-model-name", MODEL, "--enforce-eager"]
    arguments += ["--api-key", API_KEY, "--kv-cache-memory-bytes", str(2**28), "--trust-request-mm-kwargs"]
    arguments += ["--dtype", DTYPE]
    with serve(log, *arguments, program=STOCK, VLLM_PLUGINS="none") as server:
        yield server


def send(server: Server, method: str, path: str, content: Any = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
    body = content if isinstance(content, str | None) else json.dumps(content)
    return httpx.request(method, f"{server.url}{path}", content=body, headers=headers, timeout=120)


def reported(value: Any) -> Any:
    """An answer without the fields that differ between requests."""
    if isinstance(value, dict):
        return {key: reported(item) for key, item in value.items() if key not in OF_THE_MOMENT}
    return [reported(item) for item in value] if isinstance(value, list) else value


def events(text: str) -> list[Any]:
    """Data of the server-sent events of a stream."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else reported(json.loads(item)) for item in data]


def in_one(events: list[Any]) -> list[Any]:
    """A stream with the chunks of each choice joined.

    Tokens that are ready before a client has read those before them come in one chunk; their number depends on the
    machine's load, for vLLM's own server as well.
    """
    joined: list[Any] = []
    for event in events:
        last = joined[-1] if joined else None
        if not (_is_chunk(event) and _is_chunk(last) and _kind(event) == _kind(last)):
            joined.append(copy.deepcopy(event))
            continue
        for before, after in zip(last["choices"], event["choices"], strict=True):
            _join(before, after)
        last.update({key: value for key, value in event.items() if key != "choices"})
    return joined


def _is_chunk(event: Any) -> bool:
    """Whether an event has text; the first chunk of a chat has only the role, the last only the usage."""
    choices = event.get("choices") if isinstance(event, dict) else None
    return bool(choices) and not any("role" in choice.get("delta", {}) for choice in choices)


def _kind(event: dict[str, Any]) -> tuple[Any, ...]:
    return event["object"], event["model"], tuple(choice["index"] for choice in event["choices"])


def _join(before: Any, after: Any) -> None:
    """Text and lists are appended; of everything else the later value is taken."""
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            _join(old, value)
        elif key in ("text", "content", "logprobs", "token_ids") and old is not None and value is not None:
            before[key] = old + value
        else:
            before[key] = value


def content_of(answer: httpx.Response) -> Any:
    kind = answer.headers.get("content-type", "")
    if kind.startswith("application/json"):
        return reported(answer.json())
    return in_one(events(answer.text)) if kind.startswith("text/event-stream") else answer.text


def test_the_schema(server: Server, plain: Server) -> None:
    """Two routes and one field more; everything else is word for word vLLM's."""
    ours, theirs = (httpx.get(f"{one.url}/openapi.json", timeout=60).json() for one in (server, plain))
    assert set(ours["paths"]) - set(theirs["paths"]) == {"/ficoco/explain", "/ficoco/options"}
    added = set(ours["components"]["schemas"]) - set(theirs["components"]["schemas"])
    assert "FicocoRequest" in added
    rest = copy.deepcopy(ours)
    for path in ("/ficoco/explain", "/ficoco/options"):
        del rest["paths"][path]
    for name in added:
        del rest["components"]["schemas"][name]
    changed = [
        name
        for name, schema in rest["components"]["schemas"].items()
        if schema.get("properties", {}).pop("ficoco", None)
    ]
    assert rest == theirs
    names = json.dumps([theirs["paths"][path]["post"]["requestBody"] for path in ROUTES])
    assert changed
    assert all(f'/{name}"' in names for name in changed)


CHAT = {"model": MODEL, "messages": [message("what is a sign?")], "max_tokens": 8, "temperature": 0}
PROBES: dict[str, tuple[str, str, Any]] = {
    "chat": ("POST", "/v1/chat/completions", CHAT),
    "chat with log-probabilities": (
        "POST",
        "/v1/chat/completions",
        {**CHAT, "logprobs": True, "top_logprobs": 3, "n": 2, "seed": 1},
    ),
    "chat as a stream": (
        "POST",
        "/v1/chat/completions",
        {**CHAT, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "chats": ("POST", "/v1/chat/completions/batch", {**CHAT, "messages": [CHAT["messages"]] * 2}),
    "completion": (
        "POST",
        "/v1/completions",
        {"model": MODEL, "prompt": "a sign", "max_tokens": 4, "echo": True},
    ),
    "completions as a stream": (
        "POST",
        "/v1/completions",
        {"model": MODEL, "prompt": "is", "max_tokens": 4, "temperature": 0, "stream": True},
    ),
    "response": (
        "POST",
        "/v1/responses",
        {"model": MODEL, "input": "a sign", "max_output_tokens": 4, "temperature": 0},
    ),
    "tokens": ("POST", "/tokenize", {"model": MODEL, "prompt": "a sign"}),
    "text of tokens": ("POST", "/detokenize", {"model": MODEL, "tokens": [5, 6, 7]}),
    "message": (
        "POST",
        "/v1/messages",
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "a sign"}],
            "max_tokens": 4,
            "temperature": 0,
        },
    ),
    "models": ("GET", "/v1/models", None),
    "version": ("GET", "/version", None),
    "health": ("GET", "/health", None),
    "no such route": ("GET", "/v1/none", None),
    "wrong method": ("GET", "/v1/completions", None),
    "unknown model": ("POST", "/v1/chat/completions", {**CHAT, "model": "other"}),
    "out of range": ("POST", "/v1/chat/completions", {**CHAT, "temperature": -1}),
    "no messages": ("POST", "/v1/chat/completions", {"model": MODEL}),
    "no JSON": ("POST", "/v1/chat/completions", "{"),
    "an unknown field": ("POST", "/v1/chat/completions", {**CHAT, "ficco": {"keep": 1}}),
    "too long": ("POST", "/v1/completions", {"model": MODEL, "prompt": "a " * 9000, "max_tokens": 4}),
    "scale-out": ("POST", "/inference/v1/generate", {"token_ids": [1], "sampling_params": {}}),
}


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_answers_without_the_field(server: Server, plain: Server, probe: tuple[str, str, Any]) -> None:
    ours, theirs = send(server, *probe), send(plain, *probe)
    assert ours.status_code == theirs.status_code, ours.text
    assert set(ours.headers) == set(theirs.headers)
    assert content_of(ours) == content_of(theirs)


@pytest.mark.parametrize("stream", [False, True])
def test_an_image_that_keeps_its_tokens(server: Server, plain: Server, stream: bool) -> None:
    """Answers are equal to the last bit of the log-probabilities, except for documented additions.

    No other test asks about this image: a prompt out of the prefix cache is computed in other shapes.
    """
    (image,) = noise([(336, 336)], seed=4)
    chat: dict[str, Any] = {
        **CHAT,
        "messages": [message("what number is on the sign?", [data_url(image)])],
        "logprobs": True,
        "top_logprobs": 5,
        "stream": stream,
    }
    if stream:
        chat["stream_options"] = {"include_usage": True}
    path = "/v1/chat/completions"
    ours, theirs = send(server, "POST", path, {**chat, "ficoco": "off"}), send(plain, "POST", path, chat)
    assert set(ours.headers) - set(theirs.headers) == OUR_HEADERS
    content = content_of(ours)
    usage = (content[-2] if stream else content)["usage"]
    assert usage.pop("ficoco")["method"] == "off"
    assert content == content_of(theirs)


def test_metrics_are_all_there(server: Server, plain: Server) -> None:
    """All of vLLM's families, and ours. `process_` and `python_` are documented to be left out."""
    ours, theirs = (
        {
            line.split(" ")[2]
            for line in httpx.get(f"{one.url}/metrics", timeout=30).text.splitlines()
            if line.startswith("# TYPE")
        }
        for one in (server, plain)
    )
    vllm_s = {name for name in theirs if not name.startswith(("process_", "python_"))}
    assert len(vllm_s) > 50
    assert {name for name in ours if not name.startswith("ficoco:")} >= {
        name for name in vllm_s if not name.endswith("_created")
    }
    assert not any("ficoco" in name for name in theirs)
