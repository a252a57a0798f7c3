"""The parts of vLLM that we call and read still exist with the same parameters; a failure names the seam.

`test_upgrade.py` finds in our sources what we import and override, `hooks/test_table.py` checks what we wrap. Other
tests would fail too, but late and by effects: a wrapped method that vLLM no longer calls counts nothing.
"""

import ast
import inspect
from importlib import import_module
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from ficoco_vllm.server.elastic.budget import LoadRecorder
from ficoco_vllm.server.elastic.plugin import ElasticEndpoint
from ficoco_vllm.server.endpoint import FicocoEndpoint
from ficoco_vllm.server.request_field.routes import HANDLERS

pytestmark = pytest.mark.compat

# Method, and its first parameters after `self`: those that we name or pass by position.
METHODS = {
    "vllm.v1.engine.async_llm.AsyncLLM.get_num_unfinished_requests": "",
    "vllm.v1.engine.async_llm.AsyncLLM.collective_rpc": "method timeout args",
    "vllm.multimodal.media.MediaConnector.load_from_url": "url media_io fetch_timeout",
    "vllm.multimodal.media.MediaConnector.load_from_url_async": "url media_io fetch_timeout",
    "vllm.multimodal.media.MediaConnector.fetch_image_async": "image_url image_mode",
    "vllm.connections.HTTPConnection.get_async_response": "url timeout extra_headers allow_redirects",
    "vllm.connections.HTTPConnection.async_get_bytes": "url timeout allow_redirects max_bytes",
    # Prefix caching of segments.
    "vllm.v1.core.kv_cache_manager.KVCacheManager.create_kv_cache_blocks": "blocks",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.prefix_cache_lookup_enabled": "request",
    "vllm.v1.core.block_pool.BlockPool.get_cached_block": "block_hash kv_cache_group_ids",
    "vllm.v1.core.block_pool.BlockPool.cache_full_blocks": (
        "request blocks num_cached_blocks num_full_blocks block_size kv_cache_group_id"
    ),
    "vllm.v1.request.Request.update_block_hashes": "",
    "vllm.renderers.base.BaseRenderer.render_chat": "conversations chat_params",
    "vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase._update_prefill_metadata": "token_lora_tensor",
    "vllm.lora.ops.triton_ops.lora_kernel_metadata.LoRAKernelMeta.prepare_tensors": "token_lora_mapping",
}
# Module, function or method (through its class), attribute that it sets on or reads from the object named.
ATTRIBUTES = (
    ("vllm.v1.metrics.loggers", "StatLoggerManager.__init__", "self.stat_loggers"),
    ("vllm.v1.metrics.loggers", "StatLoggerManager.__init__", "self.engine_indexes"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.__init__", "self.logger_manager"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.__init__", "self.input_processor"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.shutdown", "engine_core.shutdown"),
    ("vllm.v1.engine.core_client", "MPClient.ensure_alive", "self.resources.engine_dead"),
    ("vllm.v1.engine.output_processor", "OutputProcessor.__init__", "self.request_states"),
    ("vllm.v1.engine.output_processor", "OutputProcessor.__init__", "self.log_stats"),
    ("vllm.renderers.online_renderer", "OnlineRenderer.preprocess_chat", "self.trust_request_mm_kwargs"),
    ("vllm.renderers.online_renderer", "OnlineRenderer.preprocess_cmpl", "self.trust_request_mm_kwargs"),
    ("vllm.multimodal.media.connector", "MediaConnector.__init__", "self.connection"),
    ("vllm.multimodal.media.connector", "MediaConnector.__init__", "self.allowed_media_domains"),
    ("vllm.entrypoints.launchers.api_server.app_state", "init_app_state", "state.online_renderer"),
    ("vllm.entrypoints.launchers.api_server.app_state", "init_app_state", "state.serving_tokenization"),
    ("vllm.v1.request", "Request.__init__", "self.block_hashes"),
    ("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.__init__", "self._token_lora_indices"),
    ("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.__init__", "self.indices_len"),
    ("vllm.lora.punica_wrapper.punica_gpu", "PunicaWrapperGPU.__init__", "self.token_mapping_meta"),
    ("vllm.entrypoints.generate.api_router", "init_generate_state", "state.openai_serving_chat"),
    ("vllm.entrypoints.generate.api_router", "init_generate_state", "state.openai_serving_chat_batch"),
    ("vllm.entrypoints.generate.api_router", "init_generate_state", "state.openai_serving_completion"),
    ("vllm.entrypoints.generate.api_router", "init_generate_state", "state.openai_serving_responses"),
)
# Route of `HANDLERS` to the module with its router.
ROUTERS = {
    "/v1/chat/completions": "vllm.entrypoints.openai.chat_completion.api_router",
    "/v1/chat/completions/batch": "vllm.entrypoints.openai.chat_completion.api_router",
    "/v1/completions": "vllm.entrypoints.openai.completion.api_router",
    "/v1/responses": "vllm.entrypoints.openai.responses.api_router",
    "/tokenize": "vllm.entrypoints.serve.tokenize.api_router",
}


@pytest.mark.parametrize(("seam", "parameters"), METHODS.items())
def test_methods(seam: str, parameters: str) -> None:
    module, owner, name = seam.rsplit(".", 2)
    method = getattr(getattr(import_module(module), owner, None), name, None)
    assert method is not None, f"{seam} is gone"
    names = [name for name in inspect.signature(method).parameters if name != "self"]
    expected = parameters.split()
    assert names[: len(expected)] == expected, f"{seam} takes other parameters"


@pytest.mark.parametrize(
    ("module", "function", "attribute"), ATTRIBUTES, ids=[f"{item[1]}-{item[2]}" for item in ATTRIBUTES]
)
def test_attributes(module: str, function: str, attribute: str) -> None:
    result: Any = import_module(module)
    for name in function.split("."):
        result = getattr(result, name, None)
        assert result is not None, f"{module}.{function} is gone"
    tree = ast.parse(
        dedent(inspect.getsource(inspect.unwrap(result)))
    )  # a test of this process may have wrapped it
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert attribute in used, f"{module}.{function} has no {attribute} any more"


@pytest.mark.parametrize(("name", "method", "path"), HANDLERS, ids=[path for _, _, path in HANDLERS])
def test_handlers_answer_their_routes(name: str, method: str, path: str) -> None:
    router = import_module(ROUTERS[path])
    paths = [route.path for route in router.router.routes]
    assert path in paths, f"{ROUTERS[path]} has no {path} any more"
    source = inspect.getsource(router)
    assert f".{name}" in source, f"{ROUTERS[path]} does not ask state.{name} any more"
    assert f".{method}(" in source, f"{ROUTERS[path]} does not call {method} any more"


@pytest.mark.parametrize("plugin", [FicocoEndpoint, ElasticEndpoint])
def test_our_endpoints_are_what_vllm_loads(plugin: Any) -> None:
    assert isinstance(plugin(), EndpointPlugin), "vLLM's contract of endpoint plugins has changed"


def test_a_recorder_among_vllm_s_stat_loggers() -> None:
    """Whatever the manager does with its loggers, it can do with ours."""
    seen: list[tuple[int, Any, int]] = []
    budget = SimpleNamespace(record=lambda *seen_now: seen.append(seen_now))
    recorder = LoadRecorder(budget)
    assert isinstance(recorder, AggregateStatLoggerBase)
    manager = StatLoggerManager.__new__(StatLoggerManager)
    manager.stat_loggers = [recorder]
    scheduler, iteration = SchedulerStats(), IterationStats()
    iteration.num_preempted_reqs = 2
    manager.record(scheduler, iteration, engine_idx=3)
    assert seen == [(3, scheduler, 2)], "StatLoggerManager.record does not reach stat_loggers any more"
    manager.log()
    manager.log_engine_initialized()
    manager.record_sleep_state(1, 1)
    manager.record_admission_rejection("queue_full")
    used = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(StatLoggerManager)))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("logger", "stat_logger", "agg_logger")
    }
    missing = sorted(name for name in used - {"isEnabledFor", "warning"} if not hasattr(recorder, name))
    assert missing == [], f"vLLM calls {missing} of its stat loggers, which ours does not have"
