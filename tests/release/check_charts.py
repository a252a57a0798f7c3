"""`make charts-check`: the plain chart in vLLM's sdist, rendered by Helm with our values.

The chart's own schema checks the values, Kubernetes' schemas what comes out.
"""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python import Chart
from unearth import PackageFinder

from tests.support.charts import CUSTOM, Manifest, complaints, read_values, rendered, validate
from tests.support.prometheus import needs_prometheus, promtool
from tests.support.server import options_of_serve

VLLM = "0.32.0"
CHART = "examples/deployment/chart-helm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VLLM's chart, out of its sdist.

    pip's index is read in a separate process: importing pip removes setuptools' `distutils`, which vLLM
    needs later.
    """
    out = tmp_path_factory.mktemp("vllm")
    indices = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    finder = PackageFinder(index_urls=indices, no_binary=["vllm"])
    best = finder.find_best_match(f"vllm=={VLLM}").best
    assert best is not None
    finder.download_and_unpack(best.link, out / "sources", out)
    matches = list(out.rglob(f"{CHART}/Chart.yaml"))
    assert len(matches) == 1
    return matches[0].parent


@pytest.fixture(scope="module")
def chart(folder: Path) -> Chart:
    """The chart as Helm reads it."""
    return Chart.load(folder)


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """Ours."""
    return read_values("vllm-chart.yaml")


@pytest.fixture(scope="module")
def manifests(chart: Chart, values: dict[str, Any]) -> dict[str, Manifest]:
    """Objects that Helm renders, by kind."""
    documents = rendered(chart, values)
    kinds = [document["kind"] for document in documents]
    assert len(kinds) == len(set(kinds))
    return dict(zip(kinds, documents, strict=True))


def test_the_chart_accepts_the_values(folder: Path, chart: Chart, values: dict[str, Any]) -> None:
    assert complaints(folder, chart, values) == set()
    assert complaints(folder, chart, {**values, "containerPort": "8000"}) == {"containerPort"}


def test_kubernetes_accepts_what_is_rendered(manifests: dict[str, Manifest]) -> None:
    own = set(manifests) - CUSTOM
    assert own >= {"Deployment", "Service", "PersistentVolumeClaim", "PodDisruptionBudget"}
    for kind in own:
        validate(manifests[kind])
    broken = copy.deepcopy(manifests["Deployment"])
    broken["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(broken)


def test_the_server_is_started_with_our_settings(manifests: dict[str, Manifest]) -> None:
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:3] == ["ficoco-vllm", "serve", "llava-hf/llava-1.5-7b-hf"]
    assert container["securityContext"]["runAsNonRoot"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    (init,) = pod["initContainers"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for mount in init["volumeMounts"] + container["volumeMounts"]:
        assert mount["name"] in volumes
    options = {part.split("=")[0] for part in container["command"] if part.startswith("--")}
    assert options <= options_of_serve()


def test_monitor_and_scaling_find_their_pods(manifests: dict[str, Manifest]) -> None:
    deployment = manifests["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    monitor = manifests["PodMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["podMetricsEndpoints"]
    ports = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert endpoint["port"] in ports
    scaled = manifests["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert (
        manifests["ScaledObject"]["metadata"]["namespace"] == deployment["metadata"]["namespace"] == "llava"
    )
    assert "HorizontalPodAutoscaler" not in manifests  # KEDA makes its own, two would fight


@needs_prometheus
def test_the_query_of_the_scaling_is_promql(manifests: dict[str, Manifest], tmp_path: Path) -> None:
    (trigger,) = manifests["ScaledObject"]["spec"]["triggers"]
    rules = tmp_path / "rules.yml"
    rule = {"record": "waiting", "expr": trigger["metadata"]["query"]}
    rules.write_text(yaml.safe_dump({"groups": [{"name": "scaling", "rules": [rule]}]}))
    result = promtool("check", "rules", str(rules))
    assert result.returncode == 0, result.stderr
