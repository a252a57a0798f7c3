"""Whether the engine of a server has died: vLLM's API server ends with exit status 0 then, as if told to."""

from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from typing import Any

# On the arguments of the command line, which a server in this process is given as they are.
_HAS_DIED = "ficoco_has_died"


def watch_engine(engine_client: Any, args: Namespace) -> None:
    """Note, when the engine's client is shut down, whether the engine was dead before.

    Args:
        engine_client: vLLM's `AsyncLLM`.
        args: of the command line.
    """
    resources = getattr(engine_client.engine_core, "resources", None)
    if resources is None:
        return  # the engine lives in this process
    shutdown: Callable[..., Any] = engine_client.shutdown
    was_dead: list[bool] = []

    @wraps(shutdown)
    def noted(*arguments: Any, **named: Any) -> Any:
        was_dead.append(resources.engine_dead)  # a shutdown sets it too
        return shutdown(*arguments, **named)

    engine_client.shutdown = noted
    setattr(args, _HAS_DIED, lambda: was_dead[:1] == [True])


def has_died(args: Namespace) -> bool:
    """Whether the engine that was served with these arguments has died."""
    return bool(getattr(args, _HAS_DIED, lambda: False)())
