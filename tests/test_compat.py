"""Each shim works, does nothing where it is not needed, and is missed where it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ficoco_vllm.compat import INTERPRETER_FOLDER, hook_interpreter

pytestmark = pytest.mark.compat

IMPORT = "import torchvision; from torchvision.transforms.v2 import functional; print('imported')"
HOOKED = f"import ficoco_vllm.compat; ficoco_vllm.compat.hook_torchvision(); {IMPORT}"


def python(code: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter."""
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
        timeout=120,
    )


def without_hook(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter that reads no `.pth` file."""
    site_packages = str(Path(torch.__file__).parents[1])
    return python(f"import sys; sys.path.append({site_packages!r}); {code}", "-S")


def test_every_process_can_import_torchvision() -> None:
    assert python(IMPORT).stdout == "imported\n"


def test_shim_is_still_needed() -> None:
    """Fails once PyPI's torchvision loads beside this torch: then the shim must go."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA; the shim is for CPU installs")
    plain = without_hook(IMPORT)
    if "+cpu" in without_hook("import importlib.metadata as m; print(m.version('torchvision'))").stdout:
        pytest.skip("this install got PyTorch's own CPU build of torchvision, which needs no shim")
    assert plain.returncode != 0
    assert "operator torchvision::nms does not exist" in plain.stderr


def test_calling_a_declared_operator_still_fails() -> None:
    call = "import torch; torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)"
    result = python(f"{HOOKED}; {call}")
    if result.returncode == 0:
        pytest.skip("torchvision's own operators loaded here")
    assert "imported" in result.stdout
    assert "NotImplementedError" in result.stderr


FAKE = """
import sys, types
import torch, ficoco_vllm.compat as compat
extension = types.ModuleType("torchvision.extension")
extension._has_ops = lambda: {has_ops}
sys.modules["torchvision.extension"] = extension
torch.version.cuda = {cuda}
print(compat.declare_torchvision_schemas())
"""


@pytest.mark.parametrize(("has_ops", "cuda"), [(True, None), (True, "13.0"), (False, "13.0")])
def test_shim_keeps_out_where_it_is_not_needed(has_ops: bool, cuda: str | None) -> None:
    """A matching torchvision, or a torch with CUDA, is left alone."""
    assert without_hook(FAKE.format(has_ops=has_ops, cuda=repr(cuda))).stdout == "False\n"


def test_hook_is_installed_once_and_is_light() -> None:
    code = (
        "import sys, ficoco_vllm.compat as c; c.hook_torchvision(); c.hook_torchvision(); "
        "print(sum(isinstance(f, c.TorchvisionSchemas) for f in sys.meta_path), 'torch' in sys.modules)"
    )
    assert python(code).stdout == "1 False\n"


def test_cpu_defaults_leave_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from ficoco_vllm import compat

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(compat, "is_cpu_build", lambda: True)
    compat.set_cpu_defaults()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@pytest.mark.parametrize(("num_cores", "num_threads"), [(1, "1"), (2, "1"), (16, "15")])
def test_a_core_is_left_to_the_front_end(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, num_threads: str
) -> None:
    from ficoco_vllm import compat

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(compat, "is_cpu_build", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    compat.set_cpu_defaults()
    assert os.environ["OMP_NUM_THREADS"] == num_threads


def test_gpu_build_gets_no_cpu_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from ficoco_vllm import compat

    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(compat, "is_cpu_build", lambda: False)
    compat.set_cpu_defaults()
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ


def test_interpreter_is_visible_only_if_enabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it always there, the CPU build of vLLM would take model runner V2 for every model."""
    folder = tmp_path / INTERPRETER_FOLDER
    folder.mkdir()
    monkeypatch.setattr("ficoco_vllm.compat.sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hook_interpreter()
    assert sys.path == []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hook_interpreter()
    hook_interpreter()
    assert sys.path == [str(folder)]
