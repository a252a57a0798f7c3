"""Files through which prometheus_client adds up the metrics of several processes."""

from importlib import import_module

from ficoco_vllm.hooks.wrapping import replace
from ficoco_vllm.metrics.files import ReservedMmapedDict


def hook_metric_files() -> None:
    """Make a full disk lose metrics instead of ending the process; see `ReservedMmapedDict`.

    prometheus_client up to 0.26 does not reserve the space of its files; `tests/metrics/test_files.py` fails once it
    does.
    """
    replace(import_module("prometheus_client.values"), "MmapedDict", ReservedMmapedDict)
