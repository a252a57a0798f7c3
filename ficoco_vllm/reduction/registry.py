"""Methods by name: the built-in ones, and third-party ones by entry point."""

import logging
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from ficoco_vllm.environment import METHODS_GROUP
from ficoco_vllm.reduction.control import CONTROLS
from ficoco_vllm.reduction.method import SITES, Method
from ficoco_vllm.reduction.methods import BUILTIN
from ficoco_vllm.reduction.pipeline import PIPELINES

_logger = logging.getLogger(__name__)


def available(site: str | None = None) -> tuple[str, ...]:
    """Names of the methods, sorted.

    Args:
        site: only methods of this site: "encoder", "features" or "decoder". This imports third-party methods; one that
            fails is left out with a warning. Without a site nothing is imported.

    Raises:
        ValueError: there is no such site.
    """
    third_party = _entry_points()
    if site is None:
        return tuple(sorted({*BUILTIN, *third_party}))
    if site not in SITES:
        raise ValueError(f"site = {site!r}: allowed are {', '.join(SITES)}")
    names = [name for name, method in BUILTIN.items() if method.site == site]
    for name in third_party.keys() - BUILTIN.keys():
        try:
            if get(name).site == site:
                names.append(name)
        except ValueError as error:
            _logger.warning("%s", error)
    return tuple(sorted(names))


def names() -> tuple[str, ...]:
    """Names that a server or a request may choose from: of methods, of those that reduce twice, and of controls."""
    return tuple(sorted({*available(), *PIPELINES, *CONTROLS}))


def get(name: str) -> Method:
    """A method by name. Third-party methods cannot replace built-in ones.

    Raises:
        ValueError: no such method, or its package fails to provide it.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    if name in PIPELINES:
        parts = PIPELINES[name]
        raise ValueError(
            f"{name!r} reduces twice, by {parts.encoder.name!r} and then by {parts.decoder.name!r}: "
            "get each of them"
        )
    if name in CONTROLS:
        raise ValueError(f"{name!r} is not a reduction but a control, which needs {CONTROLS[name].needs}")
    third_party = _entry_points()
    if name not in third_party:
        raise ValueError(f"method {name!r} is not known; available: {', '.join(available())}")
    entry = third_party[name]
    package = entry.dist.name if entry.dist else "an unknown package"
    try:
        method = entry.load()
    except Exception as error:  # third-party code may fail in any way
        raise ValueError(f"method {name!r} of {package} ({entry.value}) failed to load: {error}") from error
    if not isinstance(method, Method) or method.name != name:
        raise ValueError(f"{entry.value} of {package} is not a Method with the name {name!r}")
    return method


def _entry_points() -> Mapping[str, EntryPoint]:
    return _installed(tuple(sys.path))


@lru_cache(maxsize=4)
def _installed(search_path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """Entry points of the packages on a search path. Cached: a scan opens the metadata of every package."""
    return {entry.name: entry for entry in entry_points(group=METHODS_GROUP)}
