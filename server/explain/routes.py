"""`POST /ficoco/explain`, and what the page asks before."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as StarletteHTTPException

from ficoco_vllm.server.explain import pages
from ficoco_vllm.server.explain.asking import RefusedError
from ficoco_vllm.server.explain.explainer import Explainer, TraceLostError
from ficoco_vllm.server.explain.guard import RateLimiter, api_keys, check_key
from ficoco_vllm.server.explain.schema import ExplainRequest, Explanation, Options
from ficoco_vllm.server.openai_errors import error_answer

STATE = "ficoco_explainer"


class OpenAIErrors(APIRoute):
    """Errors in OpenAI's form, with their headers.

    vLLM's own handler drops the headers, and is not asked over a body that is not even text.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap what answers a request."""
        answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await answer(request)
            except StarletteHTTPException as error:
                return error_answer(str(error.detail), error.status_code, headers=error.headers)

        return handle


def make_router(keys: Sequence[str], limiter: RateLimiter) -> APIRouter:
    """The routes; they are attached only where the operator asks for them.

    Args:
        keys: one of which a client must name; none means that everybody may ask.
        limiter: of explanations.
    """
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

    def check_key_of(raw_request: Request) -> None:
        check_key(raw_request.headers, keys)

    router = APIRouter(tags=["ficoco"], dependencies=[Depends(check_key_of)], route_class=OpenAIErrors)
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 401, 413, 422, 429, 503)
    }

    @router.get("/ficoco/options", response_model=Options, responses={401: errors[401]})
    async def options(raw_request: Request) -> Options:
        """What a question may ask for."""
        return explainer(raw_request).options()

    @router.post(
        "/ficoco/explain",
        response_model=Explanation,
        responses=errors,
        dependencies=[Depends(validate_json_request), Depends(limiter.check)],
    )
    @with_cancellation
    async def explain(request: ExplainRequest, raw_request: Request) -> Response:
        """Ask with and without reduction, and tell which patches were kept and where the others went."""
        try:
            explanation = await explainer(raw_request).explain(request, raw_request)
        except RefusedError as error:
            return JSONResponse(error.response.model_dump(), status_code=error.response.error.code)
        except TraceLostError as error:
            raise HTTPException(503, f"{error}; other requests were traced meanwhile, try again") from error
        return Response(explanation.model_dump_json(), media_type="application/json")

    return router


def explainer(raw_request: Request) -> Explainer:
    """Of the server that was asked."""
    found: Explainer = getattr(raw_request.app.state, STATE)
    return found


def attach(app: FastAPI) -> None:
    """Add the route and the page, guarded as the server's command line says.

    Args:
        app: of vLLM, with `state.args`.
    """
    from vllm import envs

    args = app.state.args
    keys = api_keys(args, envs.VLLM_API_KEY)
    app.include_router(make_router(keys, RateLimiter(args.ficoco_explain_rate)))
    app.include_router(pages.router)
