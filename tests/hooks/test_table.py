"""The table of hooks is true, and complete."""

import ast
import inspect
from importlib import import_module
from typing import Any

import pytest

from ficoco_vllm.hooks.table import HOOKS, Hook
from tests.support.patches import Patch, loose_patches, patches
from tests.support.release import ROOT

pytestmark = pytest.mark.compat

SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("ficoco_vllm", "server", "kernels", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.parent != ROOT / "ficoco_vllm" / "hf"  # replaces methods of the caller's model, none of vLLM's
}


@pytest.mark.parametrize("hook", HOOKS, ids=[f"{hook.owner}.{hook.attribute}" for hook in HOOKS])
def test_exists_and_takes_what_it_took(hook: Hook) -> None:
    module, _, name = hook.owner.rpartition(".")
    try:
        owner: Any = import_module(hook.owner)
    except ModuleNotFoundError:
        owner = getattr(import_module(module), name, None)
    seam = f"{hook.owner}.{hook.attribute}"
    attribute = inspect.unwrap(getattr(owner, hook.attribute, None))
    assert attribute is not None, f"{seam} is gone"
    expected = hook.parameters.split()
    signature = inspect.signature(attribute).parameters if callable(attribute) else ()
    assert [name for name in signature if name != "self"][: len(expected)] == expected, (
        f"{seam} takes other parameters"
    )


@pytest.mark.parametrize("test", sorted({hook.test for hook in HOOKS}))
def test_is_tested(test: str) -> None:
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_nothing_else_is_patched() -> None:
    listed = {Patch(hook.owner, hook.attribute) for hook in HOOKS}
    of_objects = {Patch(None, hook.attribute) for hook in HOOKS} | {Patch(None, None)}
    result = {path: patches(source) for path, source in SOURCES.items()}
    assert {path: extra for path, made in result.items() if (extra := {*made} - listed - of_objects)} == {}
    loose = {path: loose_patches(source) for path, source in SOURCES.items()}
    del loose["ficoco_vllm/hooks/wrapping.py"]
    assert {path: statements for path, statements in loose.items() if statements} == {}


def test_every_entry_is_in_use() -> None:
    """Its name is a string in the sources, as `wrap` takes it."""
    strings = {
        node.value
        for path, source in SOURCES.items()
        if path != "ficoco_vllm/hooks/table.py"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert [hook for hook in HOOKS if hook.attribute not in strings] == []


@pytest.mark.parametrize(
    "statement",
    [
        "sampler.__class__ = Own",
        "Engine.run = anything",
        "engine.run = wrapper",
        "engine.run = lambda: 1",
        "engine.run, engine.stop = wrapper, 3",
        "setattr(engine, 'run', wrapper)",
        "setattr(engine, name, anything)",
        "vllm.engine.run = anything",
    ],
)
def test_the_check_can_fail(statement: str) -> None:
    setting = "import vllm.engine\nfrom vllm.engine import Engine\ndef wrapper(): pass\n"
    assert loose_patches(setting + statement) == [ast.unparse(ast.parse(statement).body[0])]
    for harmless in (
        "self.run = lambda: 1",
        "request.keep = 3",
        "setattr(usage, FIELD, 3)",
        "wrapper.x = wrapper",
    ):
        assert loose_patches(setting + harmless) == []


def test_calls_are_read() -> None:
    source = "from ficoco_vllm.hooks.wrapping import wrap\nfrom vllm.engine import Engine\n"
    source += "wrap(Engine, 'run', f)\nwrap(engine, name, f)\nwrap(engine.core, 'stop', f)\nother(Engine, 'run', f)\n"
    assert patches(source) == [Patch("vllm.engine.Engine", "run"), Patch(None, None), Patch(None, "stop")]
