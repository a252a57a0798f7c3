"""The methods that ship with the plugin, by name."""

from collections.abc import Mapping

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.methods.ficoco_v import FICOCO_V

BUILTIN: Mapping[str, Method] = {method.name: method for method in (FICOCO_V,)}
