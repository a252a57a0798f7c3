"""The field `ficoco` in `/openapi.json`, beside what vLLM says of its routes."""

from typing import Any

from fastapi import FastAPI

from ficoco_vllm.server.request_field.routes import READ
from ficoco_vllm.server.request_field.schema import FIELD, OFF, FicocoRequest

_COMPONENTS = "#/components/schemas/"


def publish(app: FastAPI) -> None:
    """Add the field to the schema of an application, in the way that FastAPI has for it.

    Args:
        app: of vLLM.
    """
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:  # else it was made, and told, before
            describe(plain())
        return plain()

    setattr(app, "openapi", openapi)  # noqa: B010 (a method)


def describe(schema: dict[str, Any]) -> None:
    """Add the field to the bodies of the routes that read it.

    Args:
        schema: of vLLM's application; changed in place.
    """
    components = schema["components"]["schemas"]
    components[FicocoRequest.__name__] = FicocoRequest.model_json_schema()
    field = {
        "anyOf": [{"const": OFF}, {"$ref": _COMPONENTS + FicocoRequest.__name__}, {"type": "null"}],
        "description": "How the visual tokens of the images are reduced; without it, as the server was started.",
    }
    for path in READ:
        operation = schema["paths"].get(path, {}).get("post", {})
        body = (
            operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        )
        for option in body.get("anyOf", [body]):
            name = option.get("$ref", "").removeprefix(_COMPONENTS)
            if name in components:
                components[name]["properties"][FIELD] = field
