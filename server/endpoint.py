"""The endpoint plugin: our routes on vLLM's server, and the field `ficoco` of its own."""

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.metrics.counting import token_layer_bytes
from ficoco_vllm.metrics.savings import Accountant
from ficoco_vllm.server.explain import routes
from ficoco_vllm.server.explain.explainer import Explainer
from ficoco_vllm.server.lifecycle.death import watch_engine
from ficoco_vllm.server.lifecycle.drain import STATE, Drain, DrainGate
from ficoco_vllm.server.request_field import answers
from ficoco_vllm.server.request_field.answers import UsageHeaders
from ficoco_vllm.server.request_field.ledger import Control
from ficoco_vllm.server.request_field.openapi import publish
from ficoco_vllm.server.request_field.resolve import Bounds, Resolver
from ficoco_vllm.server.request_field.routes import FieldGuard


class FicocoEndpoint:
    """What vLLM loads where `VLLM_PLUGINS` names it; without settings of ours it adds nothing.

    Attributes:
        name: in `VLLM_PLUGINS`.
        required_tasks: the server must generate.
    """

    name = "ficoco_endpoint"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the headers of answers, the field of bodies, the gate, and the routes that the operator asked for."""
        publish(app)
        app.add_middleware(UsageHeaders)
        app.add_middleware(FieldGuard)
        if getattr(app.state.args, "ficoco_explain", False):
            routes.attach(app)
        drain = Drain()
        setattr(app.state, STATE, drain)
        app.add_middleware(DrainGate, drain=drain)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Give the routes what they work with, and let requests choose method and budget."""
        if engine_client is None:
            return
        getattr(state, STATE).before_shutdown(engine_client)
        watch_engine(engine_client, args)
        # First: it keeps vLLM's own handler and renderer, as they are before requests are controlled.
        if getattr(args, "ficoco_explain", False):
            explainer = Explainer(engine_client, state.openai_serving_chat, bounds_of(args))
            setattr(state, routes.STATE, explainer)
        config = FicocoConfig.of(engine_client.model_config.hf_config)
        if config.method is not None:
            control = make_control(engine_client, args)
            control.attach(state.online_renderer)
            answers.attach(control, state)


def make_control(engine_client: Any, args: Namespace) -> Control:
    """What requests of a server may ask, and what they cost.

    Args:
        engine_client: vLLM's `AsyncLLM`, whose settings name a method.
        args: of the command line.
    """
    vllm_config = engine_client.vllm_config
    accountant = Accountant.of(engine_client.model_config.hf_config)
    plan = accountant.plan
    return Control(
        Resolver(plan, bounds_of(args)),
        accountant,
        token_layer_bytes(vllm_config) * plan.num_layers // plan.num_segments,
        engine_client.input_processor,
    )


def bounds_of(args: Namespace) -> Bounds:
    """What the operator lets requests ask for.

    Args:
        args: of the command line; plain vLLM's has none of our options.
    """
    return Bounds(getattr(args, "ficoco_min_keep", None) or 1, getattr(args, "ficoco_allow_methods", None))
