"""Our part of the server's OpenAPI schema under inputs that schemathesis generates from it: never a 5xx.

Derived from the schema that the server publishes, valid and invalid, a bounded number of them, the same in every run.
"""

import json
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ficoco_vllm.demo_model import examples
from ficoco_vllm.server.request_field.routes import ROUTES
from tests.support.server import API_KEY, Server, data_url, message

MODEL = "ficoco-demo"
NUM_PATCHES = 576
HEADERS = {"Authorization": f"Bearer {API_KEY}"}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
SMALL = data_url(Image.open(examples()[0].image))

pytestmark = pytest.mark.server


def some(count: int) -> settings:
    """Settings for a number of examples, seeded and not shrunk where one fails: each costs a request."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def cases(schema: dict[str, Any], path: str, method: str) -> st.SearchStrategy[Any]:
    """Requests that schemathesis generates for one operation, valid and invalid."""
    operation = schemathesis.openapi.from_dict(schema)[path][method]
    return st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))


def published(server: Server) -> dict[str, Any]:
    schema: dict[str, Any] = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    return schema


def test_our_routes(server: Server) -> None:
    """Answers match the schema; requests that are valid except for their image get a real one."""
    schema = published(server)
    assert {path for path in schema["paths"] if "ficoco" in path} == {"/ficoco/explain", "/ficoco/options"}
    statuses: Counter[int] = Counter()

    def check(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("image"), str):
            case.body["image"] = SMALL
            for name, most in (("max_tokens", 4), ("keep", NUM_PATCHES + 20)):
                if isinstance(case.body.get(name), int):
                    case.body[name] %= most + 1
        headers = {**(case.headers or {}), **HEADERS}
        answer = case.call_and_validate(base_url=server.url, headers=headers, checks=CHECKS)
        statuses[answer.status_code] += 1

    some(5)(given(cases(schema, "/ficoco/options", "GET"))(check))()
    some(60)(given(cases(schema, "/ficoco/explain", "POST"))(check))()
    assert statuses[200] >= 10
    assert statuses[400] >= 10


def body_of(path: str) -> dict[str, Any]:
    """A body that is valid except for our field."""
    chat = [message("is there a red sign?", [SMALL])]
    if path == "/v1/responses":
        content = [{"type": "input_image", "image_url": SMALL, "detail": "auto"}]
        return {"model": MODEL, "input": [{"role": "user", "content": content}], "max_output_tokens": 1}
    if path == "/v1/completions":
        return {"model": MODEL, "prompt": "is there", "max_tokens": 1}
    messages = [chat, chat] if path.endswith("/batch") else chat
    return {"model": MODEL, "messages": messages, **({} if path == "/tokenize" else {"max_tokens": 1})}


@pytest.mark.parametrize("path", ROUTES)
def test_the_field(server: Server, path: str) -> None:
    """Every field is applied and reported, or refused in OpenAI's form with its name; none is ignored."""
    schema = published(server)
    components = schema["components"]["schemas"]
    body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = [option["$ref"].rpartition("/")[2] for option in body.get("anyOf", [body])]
    (field,) = {json.dumps(components[name]["properties"]["ficoco"]) for name in names}
    content = {"application/json": {"schema": json.loads(field)}}  # as if it were the body
    operation = {"requestBody": {"content": content, "required": True}, "responses": {}}
    alone = {**schema, "paths": {path: {"post": operation}}}
    statuses: Counter[int] = Counter()

    def check(case: Any) -> None:
        requested = case.body
        if isinstance(requested, bytes):
            return  # no JSON
        if isinstance(requested, dict) and isinstance(requested.get("keep"), int):
            requested = {**requested, "keep": requested["keep"] % (NUM_PATCHES + 20)}
        statuses[assert_granted_or_refused(server, path, requested)] += 1

    some(30)(given(cases(alone, path, "POST"))(check))()
    assert statuses[200] >= 5
    assert statuses[400] >= 5


def assert_granted_or_refused(server: Server, path: str, requested: Any) -> int:
    """Ask with one value of the field; gives the status."""
    content = json.dumps({**body_of(path), "ficoco": requested})
    headers = {**HEADERS, "Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=120)
    assert answer.status_code in (200, 400), (requested, answer.text)
    if answer.status_code == 400:
        assert answer.json()["error"]["param"].startswith("ficoco"), (requested, answer.text)
    elif path not in ("/tokenize", "/v1/completions"):
        reported = answer.json()["usage"]["ficoco"]
        if isinstance(requested, dict) and requested.get("keep") is not None:
            assert reported["visual_tokens_kept"] == requested["keep"] * (2 if path.endswith("/batch") else 1)
        if requested == "off":
            assert reported["method"] == "off"
    return answer.status_code


def test_the_page_s_files(server: Server) -> None:
    """Whatever the path: it is one of ours, or it is not there."""
    name = {"in": "path", "name": "name", "required": True, "schema": {"type": "string"}}
    paths = {"/ficoco/{name}": {"get": {"parameters": [name], "responses": {}}}}
    document = {"openapi": "3.1.0", "info": {"title": "page", "version": "1"}, "paths": paths}

    def check(case: Any) -> None:
        answer = case.call(base_url=server.url)
        assert answer.status_code in (200, 307, 401, 404, 405), answer.status_code

    some(40)(given(cases(document, "/ficoco/{name}", "GET"))(check))()
