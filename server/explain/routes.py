"""`POST /ficoco/explain`, and `GET /ficoco/options` for its page."""

from argparse import Namespace
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as StarletteHTTPException

from ficoco_vllm.server.explain import pages
from ficoco_vllm.server.explain.chat import RefusedError
from ficoco_vllm.server.explain.explainer import Explainer, TraceLostError
from ficoco_vllm.server.explain.guard import RateLimiter, api_keys, check_key
from ficoco_vllm.server.explain.schema import ExplainRequest, Explanation, Options
from ficoco_vllm.server.openai_errors import error_response

# As web servers log it: the client closed the connection before the response.
_CLIENT_CLOSED_REQUEST = 499


class OpenAIErrors(APIRoute):
    """Route that answers errors in OpenAI's form.

    vLLM's own handler drops their headers, and does not handle a body that is not text.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler of a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except StarletteHTTPException as error:
                return error_response(str(error.detail), error.status_code, headers=error.headers)

        return handle


def attach(app: FastAPI, args: Namespace, get_explainer: Callable[[], Explainer | None]) -> None:
    """Add the routes and the page, with the keys and the rate limit of the server's command line.

    Args:
        app: vLLM's application.
        args: options of the server.
        get_explainer: the server's explainer, which exists once the engine does.
    """
    from vllm import envs
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

    keys = api_keys(args, envs.VLLM_API_KEY)
    limiter = RateLimiter(args.ficoco_explain_rate)

    def check_key_of(raw_request: Request) -> None:
        check_key(raw_request.headers, keys)

    def explainer() -> Explainer:
        explainer = get_explainer()
        assert explainer is not None  # vLLM serves after init_state
        return explainer

    router = APIRouter(tags=["ficoco"], dependencies=[Depends(check_key_of)], route_class=OpenAIErrors)
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 401, 413, 422, 429, 503)
    }

    @router.get("/ficoco/options", response_model=Options, responses={401: errors[401]})
    async def options() -> Options:
        """Model, methods and budgets that an explanation may name."""
        return explainer().options()

    @router.post(
        "/ficoco/explain",
        response_model=Explanation,
        responses=errors,
        dependencies=[Depends(validate_json_request), Depends(limiter.check)],
    )
    async def explain(request: ExplainRequest, raw_request: Request) -> Response:
        """Answer with and without reduction, and report which patches were kept and where the others went."""
        response = await answer(request, raw_request)
        # vLLM's decorator returns None where the client has disconnected; nobody receives that response.
        return Response(status_code=_CLIENT_CLOSED_REQUEST) if response is None else response

    @with_cancellation
    async def answer(request: ExplainRequest, raw_request: Request) -> Response | None:
        try:
            explanation = await explainer().explain(request, raw_request)
        except RefusedError as error:
            return JSONResponse(error.response.model_dump(), status_code=error.response.error.code)
        except TraceLostError as error:
            raise HTTPException(503, f"{error}; other requests were traced meanwhile, try again") from error
        return Response(explanation.model_dump_json(), media_type="application/json")

    app.include_router(router)
    app.include_router(pages.router)
