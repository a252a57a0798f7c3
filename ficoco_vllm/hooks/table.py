"""Table of every method and attribute of other packages that we wrap or replace. An upgrade of vLLM must keep them.

`tests/hooks/test_table.py` checks that each exists with the parameters named here, that its test exists, and that
nothing is patched that is not listed.
"""

from dataclasses import dataclass
from inspect import signature

from ficoco_vllm.compat.kernels import KERNELS


@dataclass(frozen=True)
class Hook:
    """One place of another package that is wrapped or replaced.

    Attributes:
        owner: module, or module and class.
        attribute: the method, or the name in the module or class.
        parameters: the first ones after `self`, as far as we pass or read them.
        reason: purpose of the hook.
        test: fails when vLLM no longer calls it, or calls it for something else.
    """

    owner: str
    attribute: str
    parameters: str
    reason: str
    test: str


_INPUT = "vllm.v1.engine.input_processor.InputProcessor"
_OUTPUT = "vllm.v1.engine.output_processor.OutputProcessor"
_LOGGERS = "vllm.v1.metrics.loggers.StatLoggerManager"
_RENDERER = "vllm.renderers.online_renderer.OnlineRenderer"
_CACHE = "vllm.multimodal.cache.lru.LruKeyReplicatedSenderCache"
_OPENAI = "vllm.entrypoints.openai"

HOOKS = (
    Hook(
        "vllm.config.VllmConfig",
        "try_verify_and_update_config",
        "",
        "refuses our settings for a model that the plugin does not support",
        "tests/models/test_verify.py::test_other_models_are_refused",
    ),
    Hook(
        _INPUT,
        "process_inputs",
        "request_id prompt params",
        "checks a request, gives it its budget and registers it with the metrics",
        "tests/decoder/test_refusals.py::test_refused_requests",
    ),
    Hook(
        _INPUT,
        "resolve_watermarking",
        "params",
        "refuses beam search where the decoder reduces",
        "tests/decoder/test_refusals.py::test_a_search_by_beams_is_refused",
    ),
    Hook(
        "vllm.renderers.base.BaseRenderer",
        "warmup",
        "chat_params",
        "reads the generation prompt of the chat template, which ends decision windows",
        "tests/decoder/test_windows.py::test_a_chat_finds_its_earlier_turns",
    ),
    Hook(
        _CACHE,
        "is_cached_item",
        "mm_hash",
        "marks an image as sent once its request has reached the engine",
        "tests/hooks/test_processor_cache.py::test_an_image_counts_as_sent_once_it_is",
    ),
    Hook(
        _CACHE,
        "get_and_update_item",
        "mm_item mm_hash",
        "sends an image again whose request never reached the engine",
        "tests/server/test_bad_requests.py::test_the_image_of_a_refused_request_is_answered_next",
    ),
    Hook(
        _OUTPUT,
        "add_request",
        "request",
        "attaches the savings of a request to vLLM's state of it",
        "tests/server/test_metrics.py::test_tokens_and_kv",
    ),
    Hook(
        _OUTPUT,
        "_update_stats_from_output",
        "req_state engine_core_output engine_core_timestamp iteration_stats",
        "collects latencies by method",
        "tests/server/test_metrics.py::test_histograms",
    ),
    Hook(
        _OUTPUT,
        "_update_stats_from_finished",
        "req_state finish_reason iteration_stats",
        "collects outcomes by method",
        "tests/server/test_metrics.py::test_requests_by_method_and_outcome",
    ),
    Hook(
        _OUTPUT,
        "abort_requests",
        "request_ids internal",
        "counts requests whose client disconnected",
        "tests/hooks/test_request_metrics.py::test_abort_of_a_request_with_two_answers_counts_two",
    ),
    Hook(
        _LOGGERS,
        "__init__",
        "vllm_config engine_idxs",
        "starts the counters of a server",
        "tests/server/test_metrics.py::test_default_budget",
    ),
    Hook(
        _LOGGERS,
        "record",
        "scheduler_stats iteration_stats mm_cache_stats engine_idx",
        "counts what has been collected, engine by engine",
        "tests/server/test_metrics.py::test_histograms",
    ),
    Hook(
        _RENDERER,
        "preprocess_chat",
        "request messages",
        "reads the request field `ficoco` of chats, or refuses it without an endpoint of ours",
        "tests/hooks/test_unread_field.py::test_refused_unless_an_endpoint_reads_it",
    ),
    Hook(
        _RENDERER,
        "preprocess_cmpl",
        "request prompts",
        "the same for completions",
        "tests/hooks/test_unread_field.py::test_refused_unless_an_endpoint_reads_it",
    ),
    Hook(
        "vllm.model_executor.layers.attention.Attention",
        "get_kv_cache_spec",
        "vllm_config",
        "gives an attention layer the KV cache of its segment",
        "tests/decoder/test_batches.py::test_slots_written_and_blocks_held_are_the_plans",
    ),
    Hook(
        "vllm.config.multimodal.MultiModalConfig",
        "is_multimodal_pruning_enabled",
        "",
        "recomputes positions once the tower has chosen the tokens that stay",
        "tests/models/test_qwen3_vl.py::test_served_as_defined",
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
        "_gather_mm_embeddings",
        "scheduler_output shift_computed_tokens",
        "the same on a CPU, whose runner never reads that configuration",
        "tests/models/test_qwen3_vl.py::test_served_as_defined",
    ),
    Hook(
        "vllm.v1.worker.gpu.spec_decode.ngram.speculator.NgramGPUSpeculator",
        "propose",
        "input_batch attn_metadata slot_mappings last_hidden_states aux_hidden_states num_sampled num_rejected "
        "last_sampled",
        "computes drafts in torch on a CPU",
        "tests/decoder/test_adapters.py::test_drafts_change_nothing",
    ),
    Hook(
        "prometheus_client.values",
        "MmapedDict",
        "filename read_mode",
        "makes a full disk lose metrics instead of ending the process",
        "tests/metrics/test_files.py::test_a_disk_that_becomes_full",
    ),
    Hook(
        "vllm.v1.engine.async_llm.AsyncLLM",
        "generate",
        "prompt sampling_params request_id",
        "records the answers of requests that are compared, and sends second ones with the lowest priority",
        "tests/server/quality/test_server.py::test_it_starts_with_all_tokens_and_finds_that_few_are_enough",
    ),
    Hook(
        f"{_OPENAI}.chat_completion.serving.OpenAIServingChat",
        "create_chat_completion",
        "request raw_request",
        "reads the request field `ficoco` and reports the savings in `usage`",
        "tests/server/request_field/test_request_field.py::test_official_client_sync_async_and_streaming",
    ),
    Hook(
        f"{_OPENAI}.chat_completion.batch_serving.OpenAIServingChatBatch",
        "create_batch_chat_completion",
        "request raw_request",
        "the same for batches of chats",
        "tests/server/request_field/test_request_field.py::test_batch_route_and_completions",
    ),
    Hook(
        f"{_OPENAI}.completion.serving.OpenAIServingCompletion",
        "create_completion",
        "request raw_request",
        "the same for completions",
        "tests/server/request_field/test_request_field.py::test_batch_route_and_completions",
    ),
    Hook(
        f"{_OPENAI}.responses.serving.OpenAIServingResponses",
        "create_responses",
        "request raw_request",
        "the same for responses",
        "tests/server/request_field/test_request_field.py::test_responses",
    ),
    Hook(
        "vllm.entrypoints.serve.tokenize.serving.ServingTokenization",
        "create_tokenize",
        "request raw_request",
        "reads the request field `ficoco` of a chat to tokenize",
        "tests/server/request_field/test_request_field.py::test_tokens_of_a_chat",
    ),
    Hook(
        "vllm.v1.engine.async_llm.AsyncLLM",
        "shutdown",
        "timeout",
        "waits for open requests before the shutdown, and records whether the engine had died",
        "tests/server/lifecycle/test_survival.py::test_a_stopping_server_answers_accepted_requests",
    ),
    Hook(
        "vllm.v1.engine.utils",
        "zmq_socket_ctx",
        "path socket_type bind",
        "passes on the interrupt of a server that waits for its engine",
        "tests/server/lifecycle/test_interrupts.py::test_a_starting_server_stops",
    ),
    Hook(
        "multiprocessing.process.BaseProcess",
        "start",
        "",
        "starts processes that a terminal's SIGINT does not reach",
        "tests/server/lifecycle/test_interrupts.py::test_a_starting_server_stops",
    ),
    Hook(
        "vllm.multimodal.media.image.ImageMediaIO",
        "get_max_bytes",
        "",
        "limits the size of images",
        "tests/server/media/test_media.py::test_an_image_of_too_many_bytes",
    ),
    Hook(
        "PIL.Image",
        "MAX_IMAGE_PIXELS",
        "",
        "limits the pixels of an image before it is unpacked",
        "tests/server/media/test_media.py::test_the_operator_s_limit_of_pixels",
    ),
    Hook(
        "fastapi.FastAPI",
        "openapi",
        "",
        "adds the request field `ficoco` to `/openapi.json`",
        "tests/server/request_field/test_protocol.py::test_the_schema",
    ),
    Hook(
        "vllm.v1.worker.gpu.buffer_utils.StagedWriteTensor",
        "apply_write",
        "",
        "writes tables of requests without a GPU",
        "tests/compat/test_kernels.py::test_block_tables",
    ),
    Hook(
        "vllm.v1.worker.gpu.buffer_utils.FusedStagedWriter",
        "apply",
        "tensors output_ptrs output_strides",
        "the same for block tables of several segments",
        "tests/compat/test_kernels.py::test_block_tables",
    ),
    Hook(
        "vllm.v1.worker.gpu.block_table.BlockTables",
        "gather_block_tables",
        "idx_mapping num_reqs_padded out out_ptrs",
        "collects block tables without a GPU",
        "tests/compat/test_kernels.py::test_block_tables",
    ),
    Hook(
        "vllm.v1.worker.gpu.block_table.BlockTables",
        "compute_slot_mappings",
        "idx_mapping query_start_loc positions num_tokens_padded out",
        "finds the slots of tokens without a GPU",
        "tests/compat/test_kernels.py::test_block_tables",
    ),
    Hook(
        "vllm.v1.sample.ops.topk_topp_sampler",
        "HAS_TRITON",
        "",
        "lets vLLM take its torch versions of top-k and top-p without a GPU",
        "tests/decoder/test_sampling_options.py::test_equals_stock",
    ),
    Hook(
        "vllm.model_executor.models.qwen3_vl",
        "HAS_TRITON",
        "",
        "lets Qwen3-VL interpolate its position embeddings in torch without a GPU",
        "tests/decoder/test_qwen3_vl.py::test_no_kernel_of_the_tower_is_interpreted",
    ),
    # Kernels are not patched but registered with vLLM's dispatcher. Our functions take the parameters of the kernel;
    # those with a default came with a later vLLM.
    *(
        Hook(
            name.rpartition(".")[0],
            name.rpartition(".")[2],
            " ".join(
                name
                for name, parameter in list(signature(function).parameters.items())[:-1]
                if parameter.default is parameter.empty
            ),
            "runs this Triton kernel without a GPU",
            "tests/compat/test_kernels.py::test_every_kernel_has_a_case",
        )
        for name, function in KERNELS.items()
    ),
)
