"""All stages by name. Any filter goes with any correlation and any compression.

Every module of this package lists its stages in `STAGES`; they are registered by the names of their functions.
"""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

from ficoco_vllm.reduction.stage import Compression, Correlation, Filter, Stage

K = TypeVar("K", bound=Stage)

_ALL: tuple[Stage, ...] = tuple(
    stage for module in iter_modules(__path__) for stage in import_module(f"{__name__}.{module.name}").STAGES
)


def _named(kind: type[K]) -> Mapping[str, K]:
    return {stage.name: stage for stage in _ALL if isinstance(stage, kind)}


FILTERS = _named(Filter)
CORRELATIONS = _named(Correlation)
COMPRESSIONS = _named(Compression)

__all__ = ["COMPRESSIONS", "CORRELATIONS", "FILTERS", "Compression", "Correlation", "Filter"]
