"""Helm charts with our values: what Helm makes of them, and what Kubernetes' schemas say to it."""

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from helm_python import Chart
from jsonschema import Draft202012Validator

from tests.support.prometheus import ROOT

VALUES = ROOT / "docker" / "kubernetes"
# Name of the release; it is part of the names and labels of all rendered objects.
RELEASE = {"name": "ficoco", "namespace": "llava"}
# Prometheus Operator's and KEDA's own; Kubernetes has no schemas of them.
CUSTOM = {"PodMonitor", "ServiceMonitor", "ScaledObject"}
_KUBERNETES = "1.32"

Manifest = dict[str, Any]


def read_values(name: str) -> dict[str, Any]:
    """Our values for a chart, a file of `docker/kubernetes`."""
    values: dict[str, Any] = yaml.safe_load((VALUES / name).read_text())
    return values


def rendered(chart: Chart, values: dict[str, Any]) -> list[Manifest]:
    """Objects that Helm renders from the values, with lists of objects flattened."""
    documents: list[Manifest] = []
    for text in chart.render(values, **RELEASE).values():
        for document in filter(None, yaml.safe_load_all(text)):
            documents += document["items"] if document["kind"] == "List" else [document]
    return documents


def complaints(folder: Path, chart: Chart, values: dict[str, Any]) -> set[str]:
    """Paths of the values that the chart's schema refuses.

    Helm itself would not look: the charts' .helmignore names the schema.
    """
    schema = Draft202012Validator(json.loads((folder / "values.schema.json").read_text()))
    errors = schema.iter_errors(chart.merge_values(values))
    return {"/".join(map(str, error.absolute_path)) for error in errors}


def validate(manifest: Manifest) -> None:
    """Hold an object against Kubernetes' schema of its kind, in which unknown fields are errors.

    Raises:
        kubernetes_validate.ValidationError: it does not fit.
    """
    kubernetes_validate.validate(manifest, _KUBERNETES, strict=True)
