"""Start-up checks of a method in the decoder: refused options, and settings of vLLM that it changes."""

from multiprocessing import current_process
from typing import Any

import vllm.envs as envs
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.platforms import current_platform

from ficoco_vllm.compat.versions import is_quantized_kv_cache
from ficoco_vllm.config import NAME, FicocoConfig
from ficoco_vllm.decoder.layers import why_not_reducible
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.planning.families import tower_shape
from ficoco_vllm.planning.server import decoder_planner

SCHEDULER = "ficoco_vllm.kv.scheduler.SegmentScheduler"

# Text of a window for which a step has room after the largest image, unless the settings say more.
TEXT_OF_WINDOW = 256

# These rank by the words of the question, but chats lose no accuracy (measured in docs/decoder-kv.md).
_STEADY_IN_CHATS = frozenset({"tops"})

# A child of vLLM's logger, whose handlers and level it shares.
logger = init_logger("vllm.ficoco.decoder")


def prepare_decoder(vllm_config: Any, config: FicocoConfig) -> None:
    """Refuse options that exclude a KV length per segment, and set required ones.

    Args:
        vllm_config: vLLM's configuration, with our settings stored on the model's.
        config: these settings.

    Raises:
        ValueError: naming the option and what is allowed.
    """
    hf_config = vllm_config.model_config.hf_config
    if config.windows is None:
        windows = default_windows(vllm_config, config)
        if config.window_tokens is not None and windows != "turn":
            raise ValueError(
                f"ficoco.window_tokens = {config.window_tokens} is not allowed with windows = {windows!r}, the default "
                f"of {config.method} on this server; allowed: with windows = 'turn' only"
            )
        config = config.model_copy(update={"windows": windows})
        setattr(hf_config, NAME, config.model_dump(mode="json"))
    refusal = find_refusal(vllm_config)
    if refusal is not None:
        raise ValueError(f"ficoco.method = {config.method!r}: {refusal}")
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    scheduler.scheduler_cls = SCHEDULER
    if config.windows == "off":
        scheduler.enable_chunked_prefill = False
        cache.enable_prefix_caching = False
    elif not cache.user_specified_block_size:
        # All processes plan with the size of a block, which vLLM would choose in the workers alone.
        cache.block_size = 32 if current_platform.is_cpu() else 16
        cache.user_specified_block_size = True
    longest = _longest_step(vllm_config, config)
    if config.windows == "turn":
        longest_window = min(longest - _num_decoding(vllm_config), vllm_config.model_config.max_model_len)
        config = config.model_copy(
            update={
                "window_tokens": longest_window,
                "rounding": cache.block_size if cache.enable_prefix_caching else 1,
            }
        )
        setattr(hf_config, NAME, config.model_dump(mode="json"))
    scheduler.max_num_batched_tokens = max(longest, scheduler.max_num_batched_tokens)
    scheduler.max_num_encoder_input_tokens = max(longest, scheduler.max_num_encoder_input_tokens)
    scheduler.encoder_cache_size = max(longest, scheduler.encoder_cache_size)
    # Every API server reads the same configuration again.
    if not current_process().name.startswith("ApiServer"):
        _log_budget(decoder_planner(hf_config), cache.enable_prefix_caching)


def default_windows(vllm_config: Any, config: FicocoConfig) -> str:
    """Decision windows where the settings name none.

    Args:
        vllm_config: vLLM's configuration.
        config: our settings, with a method of the decoder.

    Returns:
        "off" with an option that excludes windows; "prompt" for methods that rank by the words of the question and
        would lose accuracy on later questions; otherwise "turn".
    """
    if _excluding_windows(vllm_config):
        return "off"
    method = config.decoder_method
    assert method is not None
    reads_words = "text_features" in method.configure(**config.settings).signals
    return "prompt" if reads_words and config.method not in _STEADY_IN_CHATS else "turn"


def _excluding_windows(vllm_config: Any) -> dict[str, str]:
    """Options that exclude decision windows, with the reason."""
    cache, events = vllm_config.cache_config, vllm_config.kv_events_config
    options = {
        f"--kv-cache-dtype {cache.cache_dtype}": (
            is_quantized_kv_cache(cache.cache_dtype),
            "rounded keys in the cache could change which tokens are kept",
        ),
        "--kv-events-config": (
            events is not None and events.enable_kv_cache_events,
            "the content of a block depends on a window that its tokens do not identify",
        ),
    }
    return {option: reason for option, (holds, reason) in options.items() if holds}


def _longest_step(vllm_config: Any, config: FicocoConfig) -> int:
    """Tokens that one step must hold: a prompt with all of its images, or a window plus decoding requests."""
    scheduler, max_model_len = vllm_config.scheduler_config, int(vllm_config.model_config.max_model_len)
    if config.windows != "turn":
        return max_model_len
    num_decoding, room = _num_decoding(vllm_config), scheduler.max_num_batched_tokens
    if scheduler.max_num_scheduled_tokens is not None:
        room = min(room, scheduler.max_num_scheduled_tokens)
    if not scheduler.enable_chunked_prefill:
        return max_model_len + num_decoding
    if config.window_tokens is not None:
        return min(config.window_tokens, max_model_len) + num_decoding
    image = decoder_planner(vllm_config.model_config.hf_config).num_visual_tokens
    return int(max(room, min(image + TEXT_OF_WINDOW, max_model_len) + num_decoding))


def _num_decoding(vllm_config: Any) -> int:
    """Tokens of a step that other requests may need while one prefills."""
    speculative = vllm_config.speculative_config
    num_drafts = 0 if speculative is None else speculative.num_speculative_tokens
    return int((vllm_config.scheduler_config.max_num_seqs - 1) * (1 + num_drafts))


def _log_budget(planner: DecoderPlanner, caches: bool) -> None:
    counts = planner.counts(planner.method, planner.num_visual_tokens, planner.keep)
    logger.info(
        "ficoco: %s leaves %d of %d visual tokens of an image in the decoder; by segments of %d layers: %s "
        "(a request may ask for another budget in vllm_xargs)",
        planner.method,
        counts[-1],
        planner.num_visual_tokens,
        planner.segments.size,
        ", ".join(str(count) for count in counts),
    )
    config = planner.config
    if config.windows == "off":
        logger.info(
            "ficoco: the content of the KV cache depends on the whole prompt, so prefix caching and chunked prefill "
            "are off: long prompts delay the other requests"
        )
    elif config.windows == "prompt":
        logger.info(
            "ficoco: the content of the KV cache after an image depends on the whole prompt; prefix caching is %s for "
            "text before the first image",
            "on" if caches else "off",
        )
    else:
        logger.info(
            "ficoco: the turn that asks about an image decides which of its tokens leave; a turn may have %d tokens "
            "from the image on, which one step computes; prefix caching is %s",
            config.window_tokens,
            "on" if caches else "off",
        )


def find_refusal(vllm_config: Any) -> str | None:
    """The first option of a configuration that excludes a decoder with several KV lengths.

    Args:
        vllm_config: vLLM's configuration.

    Returns:
        A sentence that names the option and what is allowed, or None.
    """
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    cache = vllm_config.cache_config
    hf_config = vllm_config.model_config.hf_config
    unknown = why_not_reducible(hf_config.get_text_config())
    if unknown is not None:
        return unknown
    config = FicocoConfig.of(hf_config)
    longest = _longest_step(vllm_config, config)
    speculative = vllm_config.speculative_config
    refused = {
        "vision_feature_select_strategy = 'full' hands [CLS] to the decoder; allowed: 'default'": (
            tower_shape(hf_config).with_cls
        ),
        "--pipeline-parallel-size must be 1, since every worker needs all segments": (
            parallel.pipeline_parallel_size > 1
        ),
        "--data-parallel-size must be 1 with a mixture of experts, whose layers wait for as many rows of every other "
        "engine as a step has tokens": parallel.data_parallel_size > 1 and vllm_config.model_config.is_moe,
        "--decode-context-parallel-size and --prefill-context-parallel-size must be 1": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "--compilation-config cudagraph_mode = 'FULL' is not allowed: the graph of a mixed step does not support a "
        "reduction; allowed: 'FULL_AND_PIECEWISE', 'FULL_DECODE_ONLY', 'PIECEWISE', 'NONE'": replays_prefills(
            vllm_config
        ),
        "VLLM_USE_BREAKABLE_CUDAGRAPH=1 is not allowed: its graphs do not support a reduction": bool(
            envs.VLLM_USE_BREAKABLE_CUDAGRAPH
        ),
        "--enable-dbo is not allowed: a reducing step cannot be split into microbatches": parallel.use_ubatching,
        "--speculative-config is allowed with method 'ngram' only: a draft model would need the same KV lengths": (
            speculative is not None and speculative.method not in ("ngram", "ngram_gpu")
        ),
        "--kv-transfer-config is not allowed: other instances do not know the KV lengths": (
            vllm_config.kv_transfer_config is not None
        ),
        # vLLM turns it into a KV connector, but only after this check.
        "--kv-offloading-size is not allowed: what a block holds depends on the whole prompt": (
            cache.kv_offloading_size is not None
        ),
        # Packed formats of the KV cache set it themselves.
        f"--kv-cache-dtype-skip-layers {' '.join(cache.kv_cache_dtype_skip_layers)} (with --kv-cache-dtype "
        f"{cache.cache_dtype}) is not allowed: the segments share one pool of blocks, so all layers need one format; "
        "allowed: a format for all layers, such as fp8": bool(cache.kv_cache_dtype_skip_layers),
        "--runner pooling is not allowed: tokens that have left have no hidden state": (
            vllm_config.model_config.runner_type == "pooling"
        ),
        "--enable-prompt-embeds is not allowed: the placeholders of images must be known": (
            vllm_config.model_config.enable_prompt_embeds
        ),
        "--disable-hybrid-kv-cache-manager is not allowed: the segments are groups of that manager": (
            scheduler.disable_hybrid_kv_cache_manager is True
        ),
        f"--scheduler-cls {scheduler.scheduler_cls} is not allowed: the KV lengths need our scheduler": (
            scheduler.scheduler_cls not in (None, SCHEDULER)
        ),
        "--no-async-scheduling is not allowed: our scheduler is the asynchronous one": (
            scheduler.async_scheduling is False
        ),
        f"--long-prefill-token-threshold {scheduler.long_prefill_token_threshold} is not allowed: it would cut a "
        "prompt, which must be computed in one step; allowed: 0": scheduler.long_prefill_token_threshold > 0,
        f"--max-num-scheduled-tokens {scheduler.max_num_scheduled_tokens} is not allowed: "
        + ("an image with the text of its turn" if config.windows == "turn" else "a prompt")
        + f" must fit into one step; allowed: {longest} ("
        + ("in addition to decoding requests" if config.windows == "turn" else "--max-model-len")
        + ") and more": (
            scheduler.max_num_scheduled_tokens is not None and scheduler.max_num_scheduled_tokens < longest
        ),
    }
    if config.windows in ("prompt", "turn"):
        clash = f"is not allowed with ficoco.windows = {config.windows!r}"
        for option, reason in _excluding_windows(vllm_config).items():
            refused[f"{option} {clash}: {reason}; allowed: windows = 'off'"] = True
    for sentence, holds in refused.items():
        if holds:
            return sentence
    return None if vllm_config.use_v2_model_runner else _why_not_v2(vllm_config)


def replays_prefills(vllm_config: Any) -> bool:
    """Whether CUDA graphs replay whole steps with prompts, which a reducing step could not leave.

    Args:
        vllm_config: vLLM's configuration.
    """
    mode = vllm_config.compilation_config.cudagraph_mode
    return mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL


def _why_not_v2(vllm_config: Any) -> str:
    """Reason why vLLM would choose its model runner V1, which has one KV length for all layers."""
    from vllm.triton_utils import HAS_TRITON

    if envs.VLLM_USE_V2_MODEL_RUNNER is False:
        return "VLLM_USE_V2_MODEL_RUNNER=0 is not allowed: model runner V2 is needed"
    if not HAS_TRITON:
        return (
            "vLLM's model runner V2 is needed, and that needs Triton. Without a GPU set TRITON_INTERPRET=1 in the "
            "environment (`ficoco-vllm serve` does it)"
        )
    features = ", ".join(vllm_config._get_v2_model_runner_unsupported_features())
    return f"vLLM's model runner V2 is needed, which does not support: {features}"
