"""Endpoint plugin: adds our routes and the request field `ficoco` to vLLM's server."""

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.environment import ENDPOINT_PLUGIN
from ficoco_vllm.metrics.counting import token_layer_bytes
from ficoco_vllm.metrics.savings import SavingsPlanner
from ficoco_vllm.server import moving_budget
from ficoco_vllm.server.explain import routes
from ficoco_vllm.server.explain.explainer import Explainer
from ficoco_vllm.server.lifecycle.shutdown import Shutdown, ShutdownGate
from ficoco_vllm.server.openai_errors import blame_bodies
from ficoco_vllm.server.request_field.apply import FieldApplier
from ficoco_vllm.server.request_field.report import UsageHeaders
from ficoco_vllm.server.request_field.resolve import Bounds, Resolver
from ficoco_vllm.server.request_field.routes import FieldGuard, publish


class FicocoEndpoint:
    """Plugin that vLLM creates once in each API server if `VLLM_PLUGINS` names it. Holds the state of that server.

    Attributes:
        name: entry point, listed in `VLLM_PLUGINS`.
        required_tasks: the server must generate.
        shutdown: open requests, and whether the engine died; shared with `ficoco-vllm serve` through `args`.
        explainer: answers `/ficoco/explain`, where that is on.
        applier: applies the field of requests, where the server reduces.
        following: updates the budget of requests that name none, where it moves; kept so that it is not collected.
    """

    name = ENDPOINT_PLUGIN
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.shutdown = Shutdown()
        self.explainer: Explainer | None = None
        self.applier: FieldApplier | None = None
        self.following: asyncio.Task[None] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the middlewares, the field's schema, and the routes that the operator selects."""
        args = app.state.args
        self.shutdown = getattr(args, "ficoco_shutdown", self.shutdown)
        publish(app)
        blame_bodies(app)
        app.add_middleware(UsageHeaders)
        app.add_middleware(FieldGuard, is_active=lambda: self.applier is not None)
        if _explains(args):
            routes.attach(app, args, lambda: self.explainer)
        app.add_middleware(ShutdownGate, shutdown=self.shutdown)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Connect the routes with the engine."""
        if engine_client is None:
            return
        self.shutdown.attach(engine_client)
        # First: the explainer keeps vLLM's handler and renderer as they are without the field.
        if _explains(args):
            self.explainer = Explainer(engine_client, state.openai_serving_chat, _bounds(args))
        config = FicocoConfig.of(engine_client.model_config.hf_config)
        if config.method is not None:
            self.applier = _field_applier(engine_client, config, args)
            self.applier.attach(state)
            self.following = moving_budget.install(engine_client, state, args, self.applier)


def _field_applier(engine_client: Any, config: FicocoConfig, args: Namespace) -> FieldApplier:
    savings_planner = SavingsPlanner.of(engine_client.model_config.hf_config)
    plan = savings_planner.plan
    return FieldApplier(
        Resolver(plan, _bounds(args)),
        savings_planner,
        token_layer_bytes(engine_client.vllm_config) * plan.num_layers // plan.num_segments,
        engine_client.input_processor,
    )


# Plain `vllm serve` has none of our options.
def _bounds(args: Namespace) -> Bounds:
    return Bounds(getattr(args, "ficoco_min_keep", None) or 1, getattr(args, "ficoco_allow_methods", None))


def _explains(args: Namespace) -> bool:
    return bool(getattr(args, "ficoco_explain", False))
