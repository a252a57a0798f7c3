"""Finds where source code patches objects of other packages, by reading it."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """A call of `wrap` or `replace`.

    Attributes:
        owner: full name of a class or module that is imported; None for an object.
        attribute: None where it is not a literal.
    """

    owner: str | None
    attribute: str | None


def patches(source: str) -> list[Patch]:
    """Calls of our functions for patches."""
    tree = ast.parse(source)
    imported = _imported(tree)
    ours = {name for name, full in imported.items() if full.startswith("ficoco_vllm.hooks.wrapping.")}
    return [
        Patch(
            imported.get(ast.unparse(call.args[0])),
            str(call.args[1].value) if isinstance(call.args[1], ast.Constant) else None,
        )
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ours
    ]


def loose_patches(source: str) -> list[str]:
    """Statements that change an object of another package without these functions.

    Those are: another `__class__`; any attribute of an imported class or module; a function, lambda or class as an
    attribute of any object but `self`; an attribute whose name is computed.
    """
    tree = ast.parse(source)
    ours = {"ficoco_vllm", *sys.stdlib_module_names}
    imported = {name for name, full in _imported(tree).items() if full.partition(".")[0] not in ours}
    local = {node.name for node in ast.walk(tree) if isinstance(node, _DEFINITIONS)}

    def is_patch(owner: ast.expr, name: str | None, value: ast.expr) -> bool:
        text = ast.unparse(owner)
        if text in ("self", "cls") or text in local:
            return False
        is_callable = isinstance(value, ast.Lambda) or (isinstance(value, ast.Name) and value.id in local)
        return name in ("__class__", None) or text.partition(".")[0] in imported or is_callable

    return [ast.unparse(node) for node, *change in _changes(tree) if is_patch(*change)]


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _imported(tree: ast.Module) -> dict[str, str]:
    """Name in the module to full name."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({item.asname or item.name.partition(".")[0]: item.name for item in node.names})
        elif isinstance(node, ast.ImportFrom):
            names.update({item.asname or item.name: f"{node.module}.{item.name}" for item in node.names})
    return names


def _changes(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.expr, str | None, ast.expr]]:
    """Statement, object, name of its attribute (None where computed) and value of everything that sets one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            owner, name, value = node.args
            constant = isinstance(name, ast.Constant) or ast.unparse(name).rpartition(".")[2].isupper()
            yield node, owner, ast.unparse(name) if constant else None, value
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                for one, value in pairs:
                    if isinstance(one, ast.Attribute):
                        yield node, one.value, one.attr, value
