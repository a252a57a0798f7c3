"""Start-up validation of the settings, which are then stored where processor and workers read them."""

import os
from functools import partial

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from ficoco_vllm.config import NAME, FicocoConfig
from ficoco_vllm.planning.families import family, leave_image_settings, tower_shape
from ficoco_vllm.planning.tower import VisionPlanner
from ficoco_vllm.tracing.worker import QUALIFIED_NAME as TRACING_WORKER
from ficoco_vllm.vision.text_encoder import check_text_encoder

# A child of vLLM's logger, whose handlers and level it shares.
logger = init_logger("vllm.ficoco")


class FicocoModelConfig(VerifyAndUpdateConfig):
    """vLLM's configuration hook for the architectures that we replace."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Validate `additional_config["ficoco"]` against the model; does nothing without it.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        # These import vLLM's engine, which a process that only loads plugins does not need.
        from vllm.transformers_utils.processor import cached_image_processor_from_config

        from ficoco_vllm.decoder.startup import prepare_decoder
        from ficoco_vllm.hooks.admission import hook_admission
        from ficoco_vllm.hooks.request_metrics import hook_request_metrics
        from ficoco_vllm.hooks.unread_field import hook_renderer

        additional = vllm_config.additional_config
        values = additional.get(NAME) if isinstance(additional, dict) else None
        if not values:
            return
        config = FicocoConfig.parse(values)
        _check_backend(config)
        hf_config = vllm_config.model_config.hf_config
        overrides = vllm_config.model_config.get_multimodal_config().mm_processor_kwargs or {}
        leave_image_settings(
            hf_config, overrides, partial(cached_image_processor_from_config, vllm_config.model_config)
        )
        shape = tower_shape(hf_config)
        lora = vllm_config.lora_config
        if lora is not None and lora.enable_tower_connector_lora:
            raise ValueError(
                "enable_tower_connector_lora = True is not allowed with ficoco, whose tower changes its number of "
                "tokens from layer to layer; allowed: adapters of the language model"
            )
        planner = VisionPlanner.shared(config, shape)
        graphs = vllm_config.compilation_config.cudagraph_mm_encoder
        if planner.active and graphs and not family(hf_config).tower_graphs:
            raise ValueError(
                "--compilation-config cudagraph_mm_encoder = True is not allowed with a method of the tower of this "
                "model: vLLM's graph of the tower does not support a reduction; allowed: False"
            )
        if planner.active and vllm_config.model_config.uses_mrope:
            _check_positions(vllm_config)
        if config.text_encoder is not None:
            check_text_encoder(config.text_encoder, hf_config)
        if config.explain:
            _allow_traces(vllm_config)
        # The processor receives the model's configuration only, so the settings travel with it to every process.
        setattr(hf_config, NAME, config.model_dump(mode="json"))
        hook_admission()
        hook_renderer()
        if config.method is not None and config.metrics:
            hook_request_metrics()
        if planner.active:
            _bound_encoder_batch(vllm_config, planner)
        if config.decoder_method is not None:
            prepare_decoder(vllm_config, config)
        if not planner.active:
            return
        logger.info("ficoco: %s (a request may ask for another budget)", planner.in_words)


def _check_backend(config: FicocoConfig) -> None:
    """Refuse kernels that cannot run here at start-up instead of at the first image."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if config.backend == "triton" and not (current_platform.is_cuda_alike() or interpreted):
        raise ValueError(
            "ficoco.backend = 'triton' is not allowed without a GPU; allowed: 'auto', 'torch' (TRITON_INTERPRET=1 in "
            "the environment runs the kernels in Triton's interpreter, very slowly)"
        )


def _check_positions(vllm_config: VllmConfig) -> None:
    """Refuse what does not know the positions of the tokens that stay, which follow from the tower."""
    if vllm_config.model_config.get_multimodal_config().get_video_pruning_spec() is not None:
        raise ValueError(
            "--video-pruning-rate is not allowed with a method of the tower: both decide the positions of what "
            "follows; allowed: 0, or no method of the tower"
        )
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise ValueError(
            f"--pipeline-parallel-size {stages} is not allowed with a method of the tower of this model: vLLM gives "
            "the positions of the tokens that stay to the first stage alone; allowed: 1"
        )


def _allow_traces(vllm_config: VllmConfig) -> None:
    """Give the workers the method that returns traces."""
    parallel = vllm_config.parallel_config
    if parallel.worker_extension_cls not in ("", TRACING_WORKER):
        raise ValueError(
            f"worker_extension_cls = {parallel.worker_extension_cls!r} is not allowed with ficoco.explain, "
            f"which returns traces through {TRACING_WORKER}"
        )
    if parallel.data_parallel_size > 1:
        raise ValueError(
            f"data_parallel_size = {parallel.data_parallel_size} is not allowed with ficoco.explain, "
            "whose traces stay with one engine; allowed: 1"
        )
    parallel.worker_extension_cls = TRACING_WORKER


def _bound_encoder_batch(vllm_config: VllmConfig, planner: VisionPlanner) -> None:
    """Limit the images that a step encodes to the number in stock vLLM.

    vLLM counts the tokens that the encoder emits, while the tower runs all patches: with 64 of 576 it would put
    nine times as many images into one step. The largest allowed budget must still fit.
    """
    scheduler = vllm_config.scheduler_config
    most = planner.num_input_tokens
    kept = planner.num_output_tokens(planner.default)
    scheduler.max_num_encoder_input_tokens = max(most, scheduler.max_num_encoder_input_tokens * kept // most)
    scheduler.encoder_cache_size = max(most, scheduler.encoder_cache_size)
