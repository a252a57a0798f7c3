"""vLLM loads routes of plugins only where `VLLM_PLUGINS` names them, and that list is then the one for all plugins."""

import os
from importlib.metadata import entry_points

ENDPOINT = "ficoco_endpoint"
_ENDPOINT_GROUP = "vllm.endpoint_plugins"


def allow_endpoint(plugin: str = ENDPOINT) -> None:
    """Let our plugin be loaded, and beside it every one that would have been loaded without a list.

    Args:
        plugin: name of the entry point.
    """
    listed = os.environ.get("VLLM_PLUGINS")
    if listed is None:
        installed = entry_points()
        groups = [
            group for group in installed.groups if group.startswith("vllm.") and group != _ENDPOINT_GROUP
        ]
        names = sorted({entry.name for group in groups for entry in installed.select(group=group)})
    else:
        names = [name for name in listed.split(",") if name]
    if plugin not in names:
        names.append(plugin)
    os.environ["VLLM_PLUGINS"] = ",".join(names)
