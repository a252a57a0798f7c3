"""Entry point of vLLM's general plugins."""

import os

from ficoco_vllm.environment import COUNTS_IN_FILES, MEDIA_CONNECTOR, QUIET
from ficoco_vllm.planning.families import ARCHITECTURES


def register() -> None:
    """Register our model classes and the check of our settings with vLLM. Idempotent.

    vLLM calls this in every process: API server, engine core, workers, and the subprocess that inspects models. So it
    imports little, and names each model class by a string.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    if os.environ.get(QUIET):
        from ficoco_vllm.server.lifecycle.quiet import end_quietly, hide

        hide()
        end_quietly()
    if os.environ.get(COUNTS_IN_FILES):
        from ficoco_vllm.hooks.metric_files import hook_metric_files

        hook_metric_files()
    from ficoco_vllm.hooks.unknown_models import hook_unknown_models
    from ficoco_vllm.kv.spec import register_spec
    from ficoco_vllm.models.verify import FicocoModelConfig

    for architecture, location in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, location)
        MODELS_CONFIG_MAP[architecture] = FicocoModelConfig
    hook_unknown_models()
    register_spec()
    if os.environ.get("VLLM_MEDIA_CONNECTOR") == MEDIA_CONNECTOR:
        import ficoco_vllm.server.media.connector  # noqa: F401 (registers itself)
