"""Names that the supported versions of vLLM have in different modules. Only here may sources differ by version.

Each function imports where it is called: some of these modules take seconds. `tests/test_upgrade.py` reads the imports
and checks that the installed version has one of each pair; drop the older one with the version that needs it.
"""

from typing import Any


def cli_env_setup() -> None:
    """Set the environment variables of vLLM's command line."""
    try:
        from vllm.entrypoints.common.startup import cli_env_setup
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    cli_env_setup()


def make_arg_parser(parser: Any) -> Any:
    """Add the options of `vllm serve` to a parser of vLLM's class.

    Returns:
        The parser.
    """
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    return make_arg_parser(parser)


def is_quantized_kv_cache(dtype: str) -> bool:
    """Whether vLLM rounds keys and values to this format of the KV cache."""
    try:
        from vllm.v1.kv_cache_interface import is_quantized_kv_cache
    except ImportError:  # vLLM 0.32
        from vllm.utils.torch_utils import is_quantized_kv_cache
    return bool(is_quantized_kv_cache(dtype))


def internvl_chat_processors() -> tuple[Any, Any, Any]:
    """Classes that process images, videos and prompts for InternVL in OpenGVLab's format."""
    try:
        from vllm.transformers_utils.processors.internvl import (
            InternVLChatImageProcessor,
            InternVLChatProcessor,
            InternVLChatVideoProcessor,
        )
    except ImportError:  # vLLM 0.32
        from vllm.transformers_utils.processors.internvl import (
            InternVLImageProcessor as InternVLChatImageProcessor,
        )
        from vllm.transformers_utils.processors.internvl import (
            InternVLProcessor as InternVLChatProcessor,
        )
        from vllm.transformers_utils.processors.internvl import (
            InternVLVideoProcessor as InternVLChatVideoProcessor,
        )
    return InternVLChatImageProcessor, InternVLChatVideoProcessor, InternVLChatProcessor
