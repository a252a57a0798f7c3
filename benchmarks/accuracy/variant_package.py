"""Methods with other settings than their defaults, offered to a server as a package of third-party methods.

A server runs one method with settings of its own and every other one with its defaults. An ablation needs dozens of
settings; instead of as many servers, each becomes a method of its own through the entry points that any package may
use (docs/adding-a-method.md), and requests choose it by name.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import create_model

from ficoco_vllm.benchmarks.accuracy.variants import Variant
from ficoco_vllm.environment import METHODS_GROUP
from ficoco_vllm.reduction import Method, get

PACKAGE = "ficoco_bench_variants"
_SOURCE = f'''"""Methods of a benchmark run."""

from {__name__} import with_defaults
'''


def with_defaults(name: str, base: str, settings: Mapping[str, Any]) -> Method:
    """A method whose defaults are the given settings.

    Raises:
        ValueError: a setting is not allowed.
    """
    reducer = get(base).configure(**settings)
    stages = ("filter", "correlate", "compress")
    defaults = {key: getattr(reducer.settings, key) for key in settings if key not in stages}
    fields = reducer.method.settings.model_fields
    changed: dict[str, Any] = {key: (fields[key].annotation, value) for key, value in defaults.items()}
    own_settings = create_model(f"Settings of {name}", __base__=reducer.method.settings, **changed)
    return replace(
        reducer.method, name=name, title=f"{reducer.method.title} {dict(settings)}", own_settings=own_settings
    )


def write_package(folder: Path, variants: Iterable[Variant]) -> dict[str, str]:
    """Write a package of the variants with settings of their own; returns the variables that let a server find it.

    Raises:
        ValueError: a setting is not allowed.
    """
    source, entries = [_SOURCE], [f"[{METHODS_GROUP}]"]
    for name, variant in {variant.served_name: variant for variant in variants if variant.settings}.items():
        assert name is not None, "settings are those of a method"
        assert variant.method is not None
        arguments = name, variant.method, dict(variant.settings)
        with_defaults(*arguments)
        attribute = name.replace("-", "_")
        source.append(f"{attribute} = with_defaults{arguments}")
        entries.append(f"{name} = {PACKAGE}:{attribute}")
    information = folder / f"{PACKAGE}-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / f"{PACKAGE}.py").write_text("\n".join(source) + "\n")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("\n".join(entries) + "\n")
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}
