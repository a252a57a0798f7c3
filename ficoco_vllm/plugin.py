"""Entry point of vLLM's general plugins."""

ARCHITECTURES = {"LlavaForConditionalGeneration": "ficoco_vllm.models.llava:FicocoLlava"}


def register() -> None:
    """Replace the LLaVA class and hook the check of our settings into vLLM's configuration.

    vLLM calls this in every process (API server, engine core, workers, the subprocess that inspects models)
    and perhaps several times: it must stay light, so the model is named by a string and imported by vLLM when
    it is served.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ficoco_vllm.models.verify import FicocoModelConfig

    for architecture, location in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, location)
        MODELS_CONFIG_MAP[architecture] = FicocoModelConfig
