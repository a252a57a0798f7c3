"""Installation of the moving default budget that the command line configures."""

import asyncio
from argparse import Namespace
from pathlib import Path
from typing import Any

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.hooks.admission import FrontEnd
from ficoco_vllm.metrics.families import set_default_budget
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.quality.settings import OPTION as QUALITY
from ficoco_vllm.quality.settings import QualitySettings
from ficoco_vllm.server.budget import (
    DecoderBudget,
    DefaultBudget,
    Source,
    TowerBudget,
    on_server,
)
from ficoco_vllm.server.elastic.budget import ElasticBudget
from ficoco_vllm.server.elastic.settings import OPTION as ELASTIC
from ficoco_vllm.server.elastic.settings import ElasticSettings
from ficoco_vllm.server.load.recorder import LoadRecorder
from ficoco_vllm.server.quality.budget import QualityBudget
from ficoco_vllm.server.quality.comparing import Comparer
from ficoco_vllm.server.quality.figures import Figures
from ficoco_vllm.server.request_field.apply import FieldApplier


def install(
    engine_client: Any, state: Any, args: Namespace, applier: FieldApplier
) -> "asyncio.Task[None] | None":
    """Let the budget follow load and quality. Call it in the event loop of an API server process.

    Args:
        engine_client: vLLM's `AsyncLLM`.
        state: application state of vLLM's server, to whose handlers `applier` is attached.
        args: options of the command line, which every API server process gets.
        applier: applier of the request field.

    Returns:
        The task that updates the budget, where one moves; keep it, or it is collected.

    Raises:
        ValueError: vLLM keeps no statistics.
    """
    # Plain `vllm serve` has none of our options.
    elastic, quality = getattr(args, "ficoco_elastic", None), getattr(args, "ficoco_quality", None)
    if elastic is None and quality is None:
        return None
    model = engine_client.model_config
    config = FicocoConfig.of(model.hf_config)
    plan = ServerPlan.of(config, model.hf_config)
    folder, num_unfinished = Path(args.ficoco_folder), engine_client.get_num_unfinished_requests
    sources: list[Source] = []
    figures = None
    if elastic is not None:
        recorder = LoadRecorder.on(engine_client, ELASTIC)
        sources.append(ElasticBudget(ElasticSettings.load(elastic), folder, recorder, num_unfinished))
    engines = engine_client.logger_manager.engine_indexes
    if quality is not None:
        settings = QualitySettings.parse(quality)
        settings = on_server(settings, config, model.hf_config, args.ficoco_min_keep or 1)
        recorder = LoadRecorder.on(engine_client, QUALITY)
        held = QualityBudget(settings, config.method or "", folder, recorder, num_unfinished)
        sources.append(held)
        figures = Figures(model.served_model_name, str(engines[0]), held)
        policy = engine_client.vllm_config.scheduler_config.policy
        Comparer(held, plan, figures, has_priorities=policy == "priority").attach(state, engine_client)
    budget = DefaultBudget(tuple(sources))
    _apply(budget, plan, engine_client, applier)

    def show(num_tokens: int) -> None:
        if config.metrics:
            for engine in engines:
                set_default_budget(model.served_model_name, config.method or "", num_tokens, engine)
        if figures is not None:
            figures.show()

    return asyncio.get_running_loop().create_task(budget.follow(show))


def _apply(budget: DefaultBudget, plan: ServerPlan, engine_client: Any, applier: FieldApplier) -> None:
    processor = engine_client.renderer.mm_processor
    if plan.tower_follows and processor is not None:
        applier.default_tower = TowerBudget(budget, plan)
        processor.info.default_keep = applier.default_tower
    if plan.decoder is not None:
        FrontEnd.of(engine_client.input_processor).default_keep = DecoderBudget(budget, plan)
