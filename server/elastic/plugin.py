"""What vLLM loads in each API server process where the budget follows the load; it adds no routes."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.kv.admission import DEFAULT_KEEP
from ficoco_vllm.metrics.families import set_default_budget
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.server.elastic.defaults import DecoderBudget, TowerBudget
from ficoco_vllm.server.elastic.settings import ElasticSettings
from ficoco_vllm.server.elastic.source import install

# Of the entry point, hence in `VLLM_PLUGINS`.
NAME = "ficoco_elastic"
# On the server's state: the budget, and the task that keeps it up to date.
STATE = "ficoco_elastic"


class ElasticEndpoint:
    """An endpoint plugin of vLLM.

    Attributes:
        name: in `VLLM_PLUGINS`.
        required_tasks: the server must generate.
    """

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Nothing to attach."""

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Let requests that name no budget get the one that follows the load.

        Args:
            engine_client: vLLM's `AsyncLLM`.
            state: of the server.
            args: of the command line, which every API server process is given.
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

        budget, task = install(settings, Path(args.ficoco_elastic_folder), engine_client, show)
        processor = engine_client.renderer.mm_processor
        if plan.tower_follows and processor is not None:
            processor.info.default_keep = TowerBudget(budget, plan)
        if plan.decoder is not None:
            setattr(engine_client.input_processor, DEFAULT_KEEP, DecoderBudget(budget, plan))
        setattr(state, STATE, (budget, task))
