"""The endpoint plugin: our routes on vLLM's server."""

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from ficoco_vllm.server.explain import routes
from ficoco_vllm.server.explain.explainer import Explainer


class FicocoEndpoint:
    """What vLLM loads where `VLLM_PLUGINS` names it; without our options it adds nothing.

    Attributes:
        name: in `VLLM_PLUGINS`.
        required_tasks: the server must generate.
    """

    name = "ficoco_endpoint"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes that the operator asked for."""
        if getattr(app.state.args, "ficoco_explain", False):
            routes.attach(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Give the routes what they work with."""
        if engine_client is not None and getattr(args, "ficoco_explain", False):
            setattr(state, routes.STATE, Explainer(engine_client, state.openai_serving_chat))
