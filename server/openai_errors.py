"""Errors in OpenAI's form, where vLLM's own handlers do not come by."""

from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import JSONResponse


def error_answer(
    message: str, status: int, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Answer as vLLM does.

    Args:
        message: for the client.
        status: of HTTP.
        param: field of the request that it is about.
        headers: of the answer.
    """
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    known = HTTPStatus(status)
    body = create_error_response(message, known.phrase, known, param)
    return JSONResponse(body.model_dump(), status_code=known, headers=headers)
