"""Whatever a client sends is answered with 4xx in OpenAI's form, never with 5xx, and the server lives on."""

import json
import struct
import zlib
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.server.conftest import Bounded
from tests.support.pictures import noise
from tests.support.server import API_KEY, Server, data_url, message

MODEL = "ficoco-demo"
GOOD = data_url(Image.new("RGB", (64, 64), (200, 10, 10)))

pytestmark = [pytest.mark.compat, pytest.mark.server]


def post(server: Server, path: str, body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=120)


def refused(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer with 4xx."""
    assert 400 <= answer.status_code < 500, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == answer.status_code
    assert error["message"]
    assert error["type"]
    assert " object at " not in error["message"]
    assert "_io.BytesIO" not in error["message"]
    assert "Traceback" not in error["message"]
    return error


def chat(*parts: Any, **more: Any) -> dict[str, Any]:
    """A chat of one message with these parts."""
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "what is this?"}]}]
    return {"model": MODEL, "messages": messages, "max_tokens": 1, **more}


def png(width: int, height: int) -> bytes:
    """A file whose header claims these sides, and which has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


IMAGES = {
    "no image": (data_url(b"this is no image"), "the data are not an image"),
    "nothing": (data_url(b""), "the data are not an image"),
    "no comma": ("data:image/png;base64", "missing ',' separator"),
    "no base64": ("data:image/png;base64,@@@@", "not valid base64"),
    "not in base64": ("data:image/png,abc", "Only base64"),
    "cut off": (GOOD[:120], "image_url: "),
    "no pixels": (data_url(png(8, 8)), "image_url: "),
    "no height": (data_url(png(8, 0)), "image_url: "),
    "more pixels than allowed": (data_url(png(2**15, 2**15)), "exceeds limit"),
    "a thin line": (data_url(Image.new("L", (1, 5000))), "1 x 5000 pixels"),
    "a video": ("data:video/mp4;base64,AAAA", "the data are not an image"),
    "a file": ("file:///etc/hostname", "allowed-local-media-path"),
    "another scheme": ("ftp://example.invalid/a", "HTTP, data or file URL"),
    "the network": ("http://example.invalid/a", "not fetched from the network"),
    "no URL": ("?", "HTTP, data or file URL"),
    "half a character": ("data:\ud800", "image_url"),
}


@pytest.mark.parametrize(("url", "words"), IMAGES.values(), ids=IMAGES)
def test_images(server: Server, url: str, words: str) -> None:
    """On each route that takes images."""
    part = {"type": "input_image", "image_url": url, "detail": "auto"}
    responses = {"model": MODEL, "input": [{"role": "user", "content": [part]}]}
    spelled = chat({"type": "image_url", "image_url": {"url": url}})
    batch = {**spelled, "messages": [spelled["messages"]]}
    for path, body in (
        ("/v1/chat/completions", spelled),
        ("/v1/chat/completions", spelled | {"stream": True}),
        ("/v1/chat/completions/batch", batch),
        ("/v1/responses", responses),
        ("/tokenize", spelled),
    ):
        error = refused(post(server, path, body))
        if "\ud800" not in url:  # no text in UTF-8; the body itself is refused
            assert words in error["message"], path
            assert error["param"] == "image_url", path


UNUSUAL = {
    "one pixel": data_url(Image.new("RGB", (1, 1))),
    "a type that is not the data's": data_url(Image.new("RGB", (64, 64)), "text/html"),
    "upper case": "DATA:image/png;base64," + GOOD.partition(",")[2],
}


@pytest.mark.parametrize("url", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_images_are_answered(server: Server, url: str) -> None:
    assert post(
        server, "/v1/chat/completions", chat({"type": "image_url", "image_url": {"url": url}})
    ).is_success


ODD: list[Any] = [None, True, 5, "", "x", [None], {"x": None}, "\ud800"]
PARTS: list[Any] = [
    *({"type": "image_url", "image_url": value} for value in ODD),
    *({"type": "image_url", "image_url": {"url": value}} for value in ODD),
    *({"type": "image_url", "image_url": {"url": GOOD, "detail": value}} for value in ODD),
    *({"type": "image_url", "image_url": None, "uuid": value} for value in ODD),
    *({"type": "image_url", "uuid": value} for value in ODD),
    *({"type": value, "image_url": {"url": GOOD}} for value in ODD),
    *({"type": "text", "text": value} for value in ODD),
    *({"type": "image_embeds", "image_embeds": value} for value in ODD),
    *({"type": "image_pil", "image_pil": value} for value in ODD),
    *({"type": "input_image", "image_url": value} for value in ODD),
    *(
        {"type": kind}
        for kind in ("image_url", "image_pil", "image_embeds", "prompt_embeds", "video_url", "audio_url")
    ),
    {"image_url": GOOD},
    *ODD,
]
FIELDS = (
    *("echo", "extra_body", "ficoco", "input", "media_io_kwargs", "messages", "mm_processor_kwargs", "model"),
    *("prompt", "stop", "stream", "structured_outputs", "truncate_prompt_tokens", "vllm_xargs"),
)


def test_odd_parts_of_a_message(server: Server) -> None:
    _sweep(server, "/v1/chat/completions", [chat(part) for part in PARTS])


def test_odd_messages(server: Server) -> None:
    contents = [{"role": "user", "content": value} for value in ODD]
    roles = [{"role": value, "content": "x"} for value in ODD]
    lists = [[one] for one in [*contents, *roles, *ODD]]
    _sweep(server, "/v1/chat/completions", [chat() | {"messages": value} for value in [*lists, *ODD]])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"])
def test_odd_fields(server: Server, path: str) -> None:
    good: dict[str, Any] = chat({"type": "image_url", "image_url": {"url": GOOD}})
    if path == "/v1/completions":
        good = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    elif path == "/v1/responses":
        part = {"type": "input_image", "image_url": GOOD, "detail": "auto"}
        good = {"model": MODEL, "input": [{"role": "user", "content": [part]}], "max_output_tokens": 1}
    _sweep(server, path, [good | {name: value} for name in FIELDS for value in ODD])


def test_odd_input_of_responses(server: Server) -> None:
    parts: list[Any] = [
        *({"type": "input_image", "image_url": value, "detail": "auto"} for value in ODD),
        *({"type": "input_image", "file_id": value} for value in ODD),
        *({"type": "input_image", "image_url": GOOD, "detail": value} for value in ODD),
        *({"type": value, "text": "x"} for value in ODD),
        *ODD,
    ]
    inputs = [[{"role": "user", "content": [part]}] for part in parts] + [[value] for value in ODD]
    _sweep(
        server,
        "/v1/responses",
        [{"model": MODEL, "input": value, "max_output_tokens": 1} for value in inputs],
    )


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"])
def test_odd_bodies(server: Server, path: str) -> None:
    deep = b'{"messages":' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    for body in (b"", b"{", b"\xff\xfe", b"nan", deep, *(json.dumps(value).encode() for value in ODD)):
        answer = post(server, path, body)
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json().get("error") or body is deep  # FastAPI answers that itself


def _sweep(server: Server, path: str, bodies: list[Any]) -> None:
    """Send odd bodies; what vLLM accepts in spite of it is answered."""
    wrong = []
    for body in bodies:
        answer = post(server, path, body)
        if answer.status_code == 200:
            continue
        try:
            refused(answer)
        except (AssertionError, KeyError, ValueError):
            wrong.append(
                (json.dumps(body)[:600].replace(GOOD, "GOOD"), answer.status_code, answer.text[:300])
            )
    assert server.is_healthy()
    assert not wrong, "\n".join(map(str, wrong))


def test_files(bounded: Bounded) -> None:
    """A missing file and a folder below the folder that the operator allows."""
    folder = bounded.folder
    (folder / "inner").mkdir(exist_ok=True)
    (folder / "text.png").write_text("no image")
    for name, words in (
        ("missing.png", "the file does not exist"),
        ("inner", "the URL names a folder"),
        ("text.png", "the data are not an image"),
        ("", "must be a subpath"),
    ):
        error = refused(post(bounded.server, "/v1/chat/completions", _small(f"file://{folder}/{name}")))
        assert words in error["message"]
        assert error["param"] == "image_url"


def _small(url: str, **more: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [message("what is this?", [url])], "max_tokens": 1, **more}


def test_the_echo_of_a_prompt_that_the_decoder_reduces(bounded: Bounded) -> None:
    for more in (
        {"echo": True},
        {"echo": True, "stream": True},
        {"echo": True, "add_generation_prompt": False},
    ):
        error = refused(post(bounded.server, "/v1/chat/completions", _small(GOOD, **more)))
        assert error["param"] == "echo"
        assert error["message"].startswith("echo = True is not allowed")
    text = {
        "model": "small",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 1,
        "echo": True,
    }
    assert post(bounded.server, "/v1/chat/completions", text).is_success


def test_a_cached_image_by_its_uuid(server: Server) -> None:
    """The same answer and usage as with the image, for the budget of each request."""
    (image,) = noise([(336, 336)], seed=77)
    whole = {"type": "image_url", "image_url": {"url": data_url(image)}, "uuid": "test-by-uuid"}
    named = {"type": "image_url", "image_url": None, "uuid": "test-by-uuid"}
    for ficoco in (None, {"keep": 96}, "off"):
        more = {"temperature": 0, "max_tokens": 4} | ({} if ficoco is None else {"ficoco": ficoco})
        before = post(server, "/v1/chat/completions", chat(named, **more))
        assert "Cache miss for image at index 0" in refused(before)["message"]
        first = post(server, "/v1/chat/completions", chat(whole, **more)).json()
        again = post(server, "/v1/chat/completions", chat(named, **more)).json()
        assert again["choices"] == first["choices"]
        assert again["usage"]["ficoco"] == first["usage"]["ficoco"]
        assert again["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"]
