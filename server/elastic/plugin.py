"""Endpoint plugin for a budget that follows the load. It adds no routes."""

import asyncio
from argparse import Namespace
from pathlib import Path
from typing import Any

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.environment import ELASTIC_PLUGIN
from ficoco_vllm.hooks.admission import FrontEnd
from ficoco_vllm.metrics.families import set_default_budget
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.server.elastic.budget import install
from ficoco_vllm.server.elastic.defaults import DecoderBudget, TowerBudget
from ficoco_vllm.server.elastic.settings import ElasticSettings


class ElasticEndpoint:
    """Plugin that vLLM creates once in each API server if `VLLM_PLUGINS` names it.

    Attributes:
        name: entry point, listed in `VLLM_PLUGINS`.
        required_tasks: the server must generate.
        task: updates the budget; kept so that it is not collected.
    """

    name = ELASTIC_PLUGIN
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None

    def attach_router(self, app: Any) -> None:
        """Do nothing."""

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Give requests that name no budget the load-following one.

        Args:
            engine_client: vLLM's `AsyncLLM`.
            state: application state of the server.
            args: options of the command line, which every API server process gets.
        """
        text = getattr(args, "ficoco_elastic", None)
        if engine_client is None or text is None:
            return
        settings = ElasticSettings.load(text)
        model = engine_client.model_config
        config = FicocoConfig.of(model.hf_config)
        plan = ServerPlan.of(config, model.hf_config)
        engines = engine_client.logger_manager.engine_indexes if engine_client.logger_manager else []

        def show(budget: int) -> None:
            if config.metrics:
                for engine in engines:
                    set_default_budget(model.served_model_name, config.method or "", budget, engine)

        budget, self.task = install(settings, Path(args.ficoco_elastic_folder), engine_client, show)
        processor = engine_client.renderer.mm_processor
        if plan.tower_follows and processor is not None:
            processor.info.default_keep = TowerBudget(budget, plan)
        if plan.decoder is not None:
            FrontEnd.of(engine_client.input_processor).default_keep = DecoderBudget(budget, plan)
