"""The files in which prometheus_client's processes count together."""

from importlib import import_module

from ficoco_vllm.hooks.wrapping import replace
from ficoco_vllm.metrics.files import ReservedMmapedDict


def hook_metric_files() -> None:
    """Let a full disk cost metrics, not the process that counts; see `ReservedMmapedDict`.

    prometheus_client up to 0.26 does not reserve the space of its files; `tests/metrics/test_files.py` fails once it
    does.
    """
    replace(import_module("prometheus_client.values"), "MmapedDict", ReservedMmapedDict)
