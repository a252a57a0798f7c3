"""Error responses in OpenAI's form for code that vLLM's exception handlers do not cover."""

from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import JSONResponse


def error_response(
    message: str, status: int, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Build the response that vLLM would give.

    Args:
        message: text for the client.
        status: HTTP status.
        param: the request's field that caused the error.
        headers: headers of the response.
    """
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    known = HTTPStatus(status)
    body = create_error_response(message, known.phrase, known, param)
    return JSONResponse(body.model_dump(), status_code=known, headers=headers)
