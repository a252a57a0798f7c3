"""Places where our code relies on vLLM's, and a check that a source tree of vLLM has them. Nothing is imported.

Three kinds are read from our own sources: names that are imported from vLLM, methods of vLLM's classes that ours
override, and parameters of what they override.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.support.release import ROOT

SOURCES = ("ficoco_vllm", "server", "kernels", "benchmarks")


@dataclass(frozen=True, order=True)
class Seam:
    """One place in vLLM that we need.

    Attributes:
        module: of vLLM.
        name: in that module; empty for the module itself, `Class.method` for what is overridden.
        parameters: by which vLLM can call the method and which ours takes; empty for other kinds.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.module}:{self.name}" if self.name else self.module


def our_files() -> list[Path]:
    """Sources that use vLLM; the links in the package to folders beside it are not followed."""
    files = (file for folder in SOURCES for file in sorted((ROOT / folder).rglob("*.py")))
    return [file for file in files if not any(parent.is_symlink() for parent in file.parents)]


def imports(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Local name to (module, name) of everything that comes from vLLM; the name is empty for a module."""
    result = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and is_vllm(node.module or ""):
            for alias in node.names:
                result[alias.asname or alias.name] = (node.module or "", alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if is_vllm(alias.name):
                    result[alias.asname or alias.name] = (alias.name, "")
    return result


def is_vllm(module: str) -> bool:
    """Whether it is vLLM's."""
    return module == "vllm" or module.startswith("vllm.")


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    """Names, without self; a star means any number."""
    given = function.args
    names = [argument.arg for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
    stars = [f"*{given.vararg.arg}"] if given.vararg else []
    stars += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return tuple(name for name in names if name not in ("self", "cls")) + tuple(stars)


def methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions in a class's body."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child


class Tree:
    """The sources of one vLLM.

    Args:
        root: the folder `vllm`, in site-packages or in an unpacked sdist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @cache  # noqa: B019 (a tree lives as long as the run)
    def module(self, name: str) -> ast.Module | None:
        """Syntax of a module; None if there is none."""
        path = self.root.joinpath(*name.split(".")[1:])
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_text())
        return None

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Definition of a name of a module, through imports within vLLM.

        Returns:
            The defining module and the node; None if there is no such name. A submodule and a lazily loaded name
            (`__getattr__`, as in `vllm.envs`) resolve to the module itself.
        """
        tree = self.module(module)
        if tree is None:
            return None
        result: ast.AST | None = None
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                result = result or node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    result = result or node
        if result is not None:
            return module, result
        imported = self._imported(module, tree, name)
        if imported is not None:
            return imported
        strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        if self.module(f"{module}.{name}") is not None or name in strings:
            return module, tree
        return None

    def _imported(self, module: str, tree: ast.Module, name: str) -> tuple[str, ast.AST] | None:
        is_package = (self.root.joinpath(*module.split(".")[1:]) / "__init__.py").is_file()
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            for alias in node.names:
                if (alias.asname or alias.name) not in (name, "*"):
                    continue
                source = node.module or ""
                if node.level:
                    parts = module.split(".")
                    kept = parts[: len(parts) - node.level + is_package]
                    source = ".".join([*kept, *filter(None, [source])])
                if not is_vllm(source):
                    if alias.name == "*":
                        continue
                    return module, node  # of another package
                result = self.find(source, name if alias.name == "*" else alias.name)
                if result is not None:
                    return result
        return None

    def method(self, module: str, cls: str, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        """A method of a class or of the classes it inherits from."""
        result = self.find(module, cls)
        if result is None or not isinstance(result[1], ast.ClassDef):
            return None
        for function in methods(result[1]):
            if function.name == name:
                return function
        for base in result[1].bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                inherited = self.method(result[0], base.id, name)
                if inherited is not None:
                    return inherited
        return None


def seams(reference: Tree) -> dict[Seam, set[str]]:
    """Requirements of our sources.

    Args:
        reference: the vLLM that they were written for; it shows which methods of our classes override one of vLLM's.

    Returns:
        Each seam with our files that need it.
    """
    needed: dict[Seam, set[str]] = {}
    for file in our_files():
        tree = ast.parse(file.read_text())
        names = imports(tree)
        where = str(file.relative_to(ROOT))
        for module, name in names.values():
            needed.setdefault(Seam(module, name), set()).add(where)
        for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for base in cls.bases:
                base = base.value if isinstance(base, ast.Subscript) else base
                if not isinstance(base, ast.Name) or base.id not in names:
                    continue
                module, name = names[base.id]
                for function in methods(cls):
                    theirs = reference.method(module, name, function.name)
                    if theirs is not None:
                        seam = Seam(module, f"{name}.{function.name}", parameters(theirs))
                        needed.setdefault(seam, set()).add(where)
    return needed


def moved(tree: Tree, needed: dict[Seam, set[str]]) -> dict[Seam, str]:
    """Seams that a vLLM does not have any more, and what is there instead."""
    gone = {}
    for seam in needed:
        if not seam.name:
            if tree.module(seam.module) is None:
                gone[seam] = "the module is gone"
        elif "." in seam.name:
            cls, method = seam.name.split(".")
            function = tree.method(seam.module, cls, method)
            if function is None:
                gone[seam] = "nothing is overridden any more"
            elif parameters(function) != seam.parameters:
                gone[seam] = f"({', '.join(seam.parameters)}) became ({', '.join(parameters(function))})"
        elif tree.find(seam.module, seam.name) is None:
            gone[seam] = "the module is gone" if tree.module(seam.module) is None else "the name is gone"
    return gone
