"""Messages that a user need not act on, hidden while a server starts and ends; `serve --verbose` shows them.

The only place that hides anything: by logger and start of the text, never by level alone.
"""

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ficoco_vllm.environment import ENDPOINT_PLUGIN, HEALTH_QUERY, QUIET

# Value of vLLM's `--middleware`.
SERVING_LOG = "ficoco_vllm.server.lifecycle.quiet.ServingLog"
# Environment in which the user has chosen what is logged.
_CHOSEN = ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_CONFIG_PATH", "VLLM_CONFIGURE_LOGGING")
_LEVEL = "VLLM_LOGGING_LEVEL"
_SHUTDOWN = "[shutdown]"
# Logger -> starts of the texts, as the source writes them, before arguments are filled in.
HIDDEN: Mapping[str, tuple[str, ...]] = {
    "torch._library.triton": ("Triton not available, find_triton_kernels = []",),
    "vllm.config.model": ("Default vLLM sampling parameters have been overridden by %s",),
    "vllm.config.scheduler": ("Using custom scheduler class %s.",),
    "vllm.config.vllm": (
        "Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT kernel warmup.",
        "Inductor compilation was disabled by user settings",
        "Model Runner V2 requires Triton; using the V1 model runner instead.",
    ),
    "vllm.entrypoints.launchers.launcher": (_SHUTDOWN,),
    "vllm.platforms.cpu": (
        "Triton is not installed. triton-cpu is expected on x86 CPUs.",
        "Reset SSM cache type to float32 for accelerated GDN mamba backend '%s'.",
    ),
    "vllm.utils.system_utils": (
        "Found ulimit of %s and failed to automatically increase",
        f"{_SHUTDOWN} force killing sub process",
    ),
    "vllm.v1.engine.core_client": (_SHUTDOWN,),
    "vllm.v1.utils": (_SHUTDOWN,),
    "vllm.v1.worker.cpu_worker": (
        "%s is not found in LD_PRELOAD.",
        "CPU backend doesn't allow to use `torch.set_num_threads` after the thread binding",
    ),
    "uvicorn.error": (
        "Started server process",
        "Waiting for application startup.",
        "Application startup complete.",
        "Shutting down",
        "Waiting for application shutdown.",
        "Application shutdown complete.",
        "Finished server process",
    ),
}
# Starts of the texts of Python's own warnings, with their categories. The first one: vLLM looks at all attributes of
# torch. The second: vLLM ends its workers by a signal, and `cleanup.py` removes what they leave.
WARNINGS = (
    ("`torch.distributed.reduce_op` is deprecated", FutureWarning),
    ("resource_tracker", UserWarning),
)


def set_quiet(args: Any) -> bool:
    """Hide messages in this process and in all that it starts, unless the user has chosen what is logged.

    Args:
        args: options, from the light parser.

    Returns:
        Whether messages are hidden.
    """
    chosen = getattr(args, "log_level", None) or args.log_config_file or args.logging_config
    if args.verbose or chosen or any(os.environ.get(name) for name in _CHOSEN):
        return False
    os.environ[QUIET] = "1"
    os.environ[_LEVEL] = "WARNING"
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # torch's C++ announces the NUMA nodes that it binds to
    ignored = [f"ignore:{text}:{category.__name__}" for text, category in WARNINGS]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), *ignored]))
    for text, category in WARNINGS:
        warnings.filterwarnings("ignore", text, category)
    hide()
    return True


def hide() -> None:
    """Filter the loggers of this process. Idempotent."""
    for name, texts in HIDDEN.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Hidden) for known in logger.filters):
            logger.addFilter(_Hidden(texts))
    for name, is_shown in (("uvicorn.access", _hide_own_request), ("vllm.plugins", _hide_own_plugin)):
        logger = logging.getLogger(name)
        if is_shown not in logger.filters:
            logger.addFilter(is_shown)


def end_quietly() -> None:
    """Let this process end without the list that Triton's bindings print of what they have not freed. Idempotent.

    They print it after all of Python has ended. Handlers run in reverse order, so one that is registered early hides
    little else.
    """
    atexit.unregister(_close_stderr)
    atexit.register(_close_stderr)


def _close_stderr() -> None:
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class _Hidden(logging.Filter):
    """Filter of one logger."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        super().__init__()
        self._texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        return not str(record.msg).startswith(self._texts)


def _hide_own_request(record: logging.LogRecord) -> bool:
    return HEALTH_QUERY not in record.getMessage()


def _hide_own_plugin(record: logging.LogRecord) -> bool:
    """A server without our settings leaves our endpoint out; other packages' endpoints are the user's to allow."""
    return not record.getMessage().startswith(f"Found endpoint plugin(s) ['{ENDPOINT_PLUGIN}'] but")


class ServingLog:
    """ASGI middleware that shows what vLLM logs at INFO, once an API server serves."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application.

        Args:
            app: vLLM's application.
        """
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; at the end of start-up, change the level."""
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return

        async def watch(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                logger = logging.getLogger("vllm")
                logger.setLevel(logging.INFO)
                for handler in logger.handlers:
                    handler.setLevel(logging.INFO)

        await self.app(scope, receive, watch)
