"""Error responses in OpenAI's form for code that vLLM's exception handlers do not cover."""

from collections.abc import Mapping
from http import HTTPStatus
from traceback import walk_tb

from fastapi import FastAPI
from fastapi.dependencies.utils import request_body_to_args
from starlette.requests import Request
from starlette.responses import JSONResponse

# Raised by vLLM's validators for values of unexpected types. All other errors of validators already give 400.
_VALIDATOR_ERRORS = (AttributeError, AssertionError, LookupError, RecursionError)


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


def blame_bodies(app: FastAPI) -> None:
    """Answer 400 where a validator of a body's fields fails: such an error is the client's, and vLLM answers 500.

    Args:
        app: vLLM's application.
    """

    async def handle(_: Request, error: Exception) -> JSONResponse:
        frames = walk_tb(error.__traceback__)
        if all(frame.f_code is not request_body_to_args.__code__ for frame, _ in frames):
            raise error  # to vLLM's own handler
        message = f"the body has a field of a wrong type: {error or type(error).__name__}"
        return error_response(message, HTTPStatus.BAD_REQUEST)

    for kind in _VALIDATOR_ERRORS:
        app.add_exception_handler(kind, handle)
