"""Methods with other settings than their defaults, offered to a server as a package of third-party methods.

A server runs one method with settings of its own and every other one with its defaults. An ablation needs dozens of
settings; instead of as many servers, each becomes a method of its own through the entry points that any package may
use (docs/adding-a-method.md), and requests choose it by name.
"""

import json
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
    """Write a package that offers the methods of those variants that have settings of their own.

    Returns:
        Environment variables of a server that finds it in `folder`.

    Raises:
        ValueError: a setting is not allowed.
    """
    wanted = {
        name: variant
        for variant in variants
        if variant.settings and (name := variant.served_name) is not None
    }
    for name, variant in wanted.items():
        assert variant.method is not None, "what is served under a name is a method"
        with_defaults(name, variant.method, variant.settings)
    rows = [
        {"name": name, "base": variant.method, "settings": dict(variant.settings)}
        for name, variant in wanted.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "variants.json").write_text(json.dumps(rows))
    (folder / f"{PACKAGE}.py").write_text(
        '"""Methods of a benchmark run, read from variants.json."""\n\n'
        "from pathlib import Path\n\n"
        "from ficoco_vllm.benchmarks.accuracy.variant_package import load\n\n"
        "globals().update(load(Path(__file__).parent))\n"
    )
    information = folder / f"{PACKAGE}-1.0.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
    lines = [f"{row['name']} = {PACKAGE}:{_attribute(str(row['name']))}" for row in rows]
    (information / "entry_points.txt").write_text("\n".join([f"[{METHODS_GROUP}]", *lines]) + "\n")
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}


def load(folder: Path) -> dict[str, Method]:
    """The methods of a written package, by the names of its attributes."""
    rows = json.loads((folder / "variants.json").read_text())
    return {_attribute(row["name"]): with_defaults(row["name"], row["base"], row["settings"]) for row in rows}


def _attribute(name: str) -> str:
    return name.replace("-", "_")
