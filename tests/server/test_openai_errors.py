"""Errors that vLLM's handlers would blame on the server."""

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel, model_validator
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from ficoco_vllm.server.openai_errors import blame_bodies

pytestmark = pytest.mark.compat


class Body(BaseModel):
    """A body with a validator such as vLLM has for `structured_outputs`."""

    settings: Any = None

    @model_validator(mode="before")
    @classmethod
    def check(cls, data: Any) -> Any:
        data["settings"].get("regex")
        return data


@pytest.fixture
def client() -> TestClient:
    """An application as vLLM builds it, ours first."""
    app = FastAPI()

    @app.post("/read")
    async def read(body: Body) -> str:
        return str(body.settings)

    @app.post("/broken")
    async def broken(body: Body) -> str:
        return str(body.settings.nothing)

    blame_bodies(app)
    init_exception_handler(app)
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.engine_client = SimpleNamespace(errored=False, is_running=True)
    app.state.server = SimpleNamespace(should_exit=False)
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize("body", [{"settings": 5}, {"settings": None}, {}])
def test_a_validator_s_error_is_the_client_s(client: TestClient, body: Any) -> None:
    answer = client.post("/read", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == 400
    assert error["message"].startswith("the body has a field of a wrong type: ")


def test_a_handler_s_error_stays_the_server_s(client: TestClient) -> None:
    assert client.post("/read", json={"settings": {}}).status_code == 200
    assert client.post("/broken", json={"settings": {}}).status_code == 500
