"""Entry point of vLLM's general plugins."""

import os

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "ficoco_vllm.models.llava:FicocoLlava",
    "LlavaNextForConditionalGeneration": "ficoco_vllm.models.llava_next:FicocoLlavaNext",
}
# What vLLM's VLLM_MEDIA_CONNECTOR must say for our loader of images to be used; `ficoco-vllm serve` sets it.
MEDIA_CONNECTOR = "ficoco"
# Environment of `ficoco-vllm serve --ficoco-max-image-pixels`: the largest image that the connector unpacks.
MAX_PIXELS = "FICOCO_MAX_IMAGE_PIXELS"
# The same of `--ficoco-max-image-mb` and `--ficoco-max-body-mb`, in bytes, and of `--ficoco-allow-private-media`.
MAX_IMAGE_BYTES = "FICOCO_MAX_IMAGE_BYTES"
MAX_BODY_BYTES = "FICOCO_MAX_BODY_BYTES"
ALLOW_PRIVATE_MEDIA = "FICOCO_ALLOW_PRIVATE_MEDIA"
# Environment of a `ficoco-vllm serve` whose processes count together in files.
COUNTS_IN_FILES = "FICOCO_COUNTS_IN_FILES"


def register() -> None:
    """Replace the LLaVA classes and hook the check of our settings into vLLM's configuration.

    vLLM calls this in every process (API server, engine core, workers, the subprocess that inspects models)
    and perhaps several times: it must stay light, so each model is named by a string and imported by vLLM when
    it is served.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    if os.environ.get(COUNTS_IN_FILES):
        from ficoco_vllm.hooks.metric_files import hook_metric_files

        hook_metric_files()
    from ficoco_vllm.kv.spec import register_spec
    from ficoco_vllm.models.verify import FicocoModelConfig

    for architecture, location in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, location)
        MODELS_CONFIG_MAP[architecture] = FicocoModelConfig
    register_spec()
    if os.environ.get("VLLM_MEDIA_CONNECTOR") == MEDIA_CONNECTOR:
        import ficoco_vllm.server.media.connector  # noqa: F401 (registers itself)
