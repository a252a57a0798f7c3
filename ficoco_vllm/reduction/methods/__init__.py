"""The methods that ship with the plugin, by name: every `Method` in a module of this package."""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

from ficoco_vllm.reduction.method import Method

BUILTIN: Mapping[str, Method] = {
    value.name: value
    for module in iter_modules(__path__)
    for value in vars(import_module(f"{__name__}.{module.name}")).values()
    if isinstance(value, Method)
}
