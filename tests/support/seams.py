"""Places where our code relies on vLLM's, and a check that a source tree of vLLM has them. Nothing is imported.

Four kinds are read from our own sources: names that are imported from vLLM, methods of vLLM's classes that ours
override, parameters of what they override, and those of the kernels and methods that functions of ours replace.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.support.release import ROOT

SOURCES = ("ficoco_vllm", "server", "kernels", "benchmarks", "tests")


@dataclass(frozen=True, order=True)
class Seam:
    """One place in vLLM that we need.

    Attributes:
        module: of vLLM.
        name: in that module; empty for the module itself, `Class.method` for what is overridden.
        parameters: of vLLM's method or kernel, which ours overrides or replaces; empty for other kinds.
        others: places where other versions of vLLM have the name, each a module and a name.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = field(default=(), compare=False)
    others: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.module}:{self.name}" if self.name else self.module


@cache
def syntax(file: Path) -> ast.Module:
    """Syntax of a file, parsed once; trees that link to it share it by its resolved path."""
    return ast.parse(file.read_text())


@cache
def nodes(tree: ast.Module) -> tuple[ast.AST, ...]:
    """All nodes of a file, walked once."""
    return tuple(ast.walk(tree))


@cache
def our_sources() -> tuple[tuple[str, ast.Module], ...]:
    """Files that may use vLLM, with their syntax; the links in the package to folders beside it are not followed."""
    files = (file for folder in SOURCES for file in sorted((ROOT / folder).rglob("*.py")))
    ours = (file for file in files if not any(parent.is_symlink() for parent in file.parents))
    return tuple((str(file.relative_to(ROOT)), syntax(file)) for file in ours)


@cache
def imports(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Local name to (module, name) of everything that comes from vLLM; the name is empty for a module."""
    result = {}
    for node in nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and is_vllm(node.module or ""):
            for alias in node.names:
                result[alias.asname or alias.name] = (node.module or "", alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if is_vllm(alias.name):
                    result[alias.asname or alias.name] = (alias.name, "")
    return result


@cache
def alternatives(tree: ast.Module) -> list[tuple[tuple[str, str], ...]]:
    """Places of a name that is imported where one of `try` and `except ImportError` finds it."""
    result = []
    for node in nodes(tree):
        if isinstance(node, ast.Try):
            parts = [node.body, *(handler.body for handler in node.handlers)]
            names = [imports(ast.Module(part, [])) for part in parts]
            result += [
                tuple(part[name] for part in names)
                for name in names[0]
                if all(name in part for part in names)
            ]
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
        self._modules: dict[str, ast.Module | None] = {}
        self._found: dict[tuple[str, str], tuple[str, ast.AST] | None] = {}

    def module(self, name: str) -> ast.Module | None:
        """Syntax of a module, parsed once; None if there is none."""
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def _parse(self, name: str) -> ast.Module | None:
        path = self.root.joinpath(*name.split(".")[1:])
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return syntax(file.resolve())
        return None

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Definition of a name of a module, through imports within vLLM; looked up once.

        Returns:
            The defining module and the node; None if there is no such name. A submodule and a lazily loaded name
            (`__getattr__`, as in `vllm.envs`) resolve to the module itself.
        """
        if (module, name) not in self._found:
            self._found[module, name] = self._find(module, name)
        return self._found[module, name]

    def _find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        tree = self.module(module)
        if tree is None:
            return None
        result: ast.AST | None = None
        for node in nodes(tree):
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
        strings = (node.value for node in nodes(tree) if isinstance(node, ast.Constant))
        if self.module(f"{module}.{name}") is not None or name in strings:
            return module, tree
        return None

    def _imported(self, module: str, tree: ast.Module, name: str) -> tuple[str, ast.AST] | None:
        is_package = (self.root.joinpath(*module.split(".")[1:]) / "__init__.py").is_file()
        for node in nodes(tree):
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


def overrides(reference: Tree) -> Iterator[tuple[Seam, str, tuple[str, ...]]]:
    """Methods of ours that override one of vLLM's.

    Args:
        reference: the vLLM that shows which ones do.

    Yields:
        The seam, our file and the parameters that our method takes.
    """
    for where, tree in our_sources():
        names = imports(tree)
        for cls in (node for node in nodes(tree) if isinstance(node, ast.ClassDef)):
            for base in cls.bases:
                base = base.value if isinstance(base, ast.Subscript) else base
                if not isinstance(base, ast.Name) or base.id not in names:
                    continue
                module, name = names[base.id]
                for function in methods(cls):
                    if function.name == "__init__" and not _hands_on(function):
                        continue  # only ours is called
                    theirs = reference.method(module, name, function.name)
                    if theirs is not None:
                        seam = Seam(module, f"{name}.{function.name}", parameters(theirs))
                        yield seam, where, parameters(function)


def replacements(reference: Tree) -> Iterator[tuple[Seam, str, tuple[str, ...]]]:
    """Kernels and methods of model runner V2 that functions of `compat/kernels` replace; see `overrides`."""
    folder = ROOT / "ficoco_vllm" / "compat" / "kernels"
    functions = {
        (file.stem, node.name): node
        for file in folder.glob("*.py")
        for node in syntax(file).body
        if isinstance(node, ast.FunctionDef)
    }
    tables = [
        ast.literal_eval(_quoted(node.value))
        for node in syntax(folder / "__init__.py").body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
    ]
    (kernels,) = tables
    named = [
        (f"vllm.v1.worker.gpu.{module}", kernel, tuple(ours.split(".")))
        for module, replaced in kernels.items()
        for kernel, ours in replaced.items()
    ]
    hooks = syntax(ROOT / "ficoco_vllm" / "hooks" / "kernels.py")
    for call in (node for node in ast.walk(hooks) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id == "replace":
            owner, name, ours = call.args
            if isinstance(ours, ast.Attribute):
                module, cls = imports(hooks)[ast.unparse(owner)]
                named.append((module, f"{cls}.{ast.literal_eval(name)}", ("blocks", ours.attr)))
    for module, name, function in named:
        theirs = _function(reference, Seam(module, name))
        if theirs is not None:
            seam = Seam(module, name, parameters(theirs))
            yield seam, f"ficoco_vllm/compat/kernels/{function[0]}.py", parameters(functions[function])


def _quoted(node: ast.expr) -> ast.expr:
    """A dictionary of dictionaries, with the names of its values as strings."""
    assert isinstance(node, ast.Dict)
    values = [
        _quoted(value) if isinstance(value, ast.Dict) else ast.Constant(ast.unparse(value))
        for value in node.values
    ]
    return ast.Dict(node.keys, values)


def _hands_on(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a method calls the one that it overrides."""
    return any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(function))


def seams(reference: Tree) -> dict[Seam, set[str]]:
    """Requirements of our sources.

    Args:
        reference: the vLLM that they were written for; it shows which methods of our classes override one of vLLM's.

    Returns:
        Each seam with our files that need it.
    """
    needed: dict[Seam, set[str]] = {}
    for where, tree in our_sources():
        choices = {place: choice for choice in alternatives(tree) for place in choice}
        for place in imports(tree).values():
            seam = Seam(*choices.get(place, (place,))[0], others=choices.get(place, ())[1:])
            needed.setdefault(seam, set()).add(where)
    for seam, where, _ in (*overrides(reference), *replacements(reference)):
        needed.setdefault(seam, set()).add(where)
    return needed


def moved(tree: Tree, needed: dict[Seam, set[str]]) -> dict[Seam, str]:
    """Seams that a vLLM does not have any more, and what is there instead."""
    gone = {}
    for seam in needed:
        if not seam.name:
            if tree.module(seam.module) is None:
                gone[seam] = "the module is gone"
        elif "." in seam.name or seam.parameters:
            function = _function(tree, seam)
            if function is None:
                gone[seam] = "nothing is overridden any more" if "." in seam.name else "the kernel is gone"
            elif parameters(function) != seam.parameters:
                gone[seam] = f"({', '.join(seam.parameters)}) became ({', '.join(parameters(function))})"
        elif all(tree.find(*place) is None for place in ((seam.module, seam.name), *seam.others)):
            gone[seam] = "the module is gone" if tree.module(seam.module) is None else "the name is gone"
    return gone


def broken(tree: Tree, reference: Tree) -> dict[Seam, str]:
    """Seams that a vLLM has moved and our sources do not handle.

    An override with `*` or `**` hands on the rest. What replaces a function names each parameter that came.
    """
    gone = moved(tree, seams(reference))
    handled = {seam: True for seam in gone if _function(tree, seam) is not None}
    for seam, _, ours in overrides(reference):
        if seam in handled:
            names = [name for name in ours if not name.startswith("*")]
            theirs = list(parameters(_function(tree, seam)))
            handled[seam] &= theirs[: len(names)] == names and (
                len(theirs) == len(names) or len(ours) > len(names)
            )
    for seam, _, ours in replacements(reference):
        if seam in handled:
            came = set(parameters(_function(tree, seam))) - set(seam.parameters)
            left = set(seam.parameters) - set(parameters(_function(tree, seam)))
            handled[seam] &= came <= set(ours) and not left & set(ours)
    return {seam: what for seam, what in gone.items() if not handled.get(seam)}


def _function(tree: Tree, seam: Seam) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """A method, or a function with parameters."""
    cls, _, method = seam.name.partition(".")
    if method:
        return tree.method(seam.module, cls, method)
    found = tree.find(seam.module, seam.name)
    return found[1] if found and isinstance(found[1], ast.FunctionDef | ast.AsyncFunctionDef) else None
