"""The tests of the kernels need torch, Triton and pytest: a GPU machine without vLLM can run them."""

import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

FOLDER = Path(__file__).parent
# What these tests may import of other projects, and what torch, Triton and pytest bring.
ALLOWED = {
    *("torch", "triton", "pytest", "_pytest", "pytest_timeout", "pluggy", "iniconfig", "pygments"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions", "numpy"),
    *("packaging", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy"),
    *("setuptools", "ficoco_vllm", "ficoco_interpreter", "functorch", "torchgen", "py", "tests"),
}
# Refuses every other package, then collects the tests.
ALONE = """
import sys
class Refusing:
    others = set(sys.argv[1].split())
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.others:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
sys.meta_path.insert(0, Refusing())
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def test_torch_and_triton_are_enough() -> None:
    others = sorted(set(packages_distributions()) - ALLOWED - set(sys.stdlib_module_names))
    assert {"vllm", "openai", "transformers", "PIL"} <= set(others)
    options = [str(FOLDER), "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, " ".join(others), *options],
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    collected = {
        line.partition("::")[0].rpartition("/")[2] for line in done.stdout.splitlines() if "::" in line
    }
    assert collected == {path.name for path in FOLDER.glob("test_*.py")}
