"""Names that the processes of one server share through the environment."""

import os
from importlib.metadata import entry_points

# Key of our settings in vLLM's `additional_config`.
NAME = "ficoco"
# Group of entry points in which packages offer methods.
METHODS_GROUP = "ficoco_vllm.reductions"
# Value of VLLM_MEDIA_CONNECTOR that selects our image loader; `ficoco-vllm serve` sets it.
MEDIA_CONNECTOR = "ficoco"
# Limits of `ficoco-vllm serve`: --ficoco-max-image-pixels, --ficoco-max-image-mb and --ficoco-max-body-mb (in bytes),
# --ficoco-allow-private-media ("1").
MAX_PIXELS = "FICOCO_MAX_IMAGE_PIXELS"
MAX_IMAGE_BYTES = "FICOCO_MAX_IMAGE_BYTES"
MAX_BODY_BYTES = "FICOCO_MAX_BODY_BYTES"
ALLOW_PRIVATE_MEDIA = "FICOCO_ALLOW_PRIVATE_MEDIA"
# Set where the processes of a server add up their metrics in files.
COUNTS_IN_FILES = "FICOCO_COUNTS_IN_FILES"
# Set where messages that a user need not act on are hidden.
QUIET = "FICOCO_QUIET"
# Query of the request by which `ficoco-vllm serve` learns that its server answers.
HEALTH_QUERY = "from=ficoco-vllm"
# Our entry point in vLLM's group of endpoint plugins.
ENDPOINT_PLUGIN = "ficoco_endpoint"
_ENDPOINT_GROUP = "vllm.endpoint_plugins"


def enable_endpoint_plugin(name: str) -> None:
    """Add an endpoint plugin to VLLM_PLUGINS.

    vLLM loads endpoint plugins only where this list names them, and the list then holds for all plugins. So a new
    list also names every other plugin that vLLM loads without one.

    Args:
        name: the plugin's entry point.
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
    if name not in names:
        names.append(name)
    os.environ["VLLM_PLUGINS"] = ",".join(names)
