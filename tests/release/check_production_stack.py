"""`make charts-check PRODUCTION_STACK=FOLDER`: the chart of vLLM's production stack, rendered by Helm with our values.

The chart is in no registry of packages: FOLDER is `helm/` in a clone of github.com/vllm-project/production-stack. What
`helm pull` fetches will not do, since the chart is packed without its schema. The sub-charts may be missing.
"""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart

from ficoco_vllm import __version__
from ficoco_vllm.config import FicocoConfig
from tests.support.charts import CUSTOM, RELEASE, Manifest, complaints, read_values, rendered, validate
from tests.support.prometheus import needs_prometheus, promtool

FOLDER = os.environ.get("PRODUCTION_STACK", "")
MODEL = "llava-hf/llava-1.5-7b-hf"
ENGINE = "Deployment/ficoco-llava-deployment-vllm"
ROUTER = "Deployment/ficoco-deployment-router"

pytestmark = pytest.mark.skipif(
    not FOLDER, reason="PRODUCTION_STACK does not name a folder with the chart of vLLM's production stack"
)


@pytest.fixture(scope="module")
def chart() -> Chart:
    """The chart as Helm reads it."""
    return Chart.load(Path(FOLDER))


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """Ours."""
    return read_values("production-stack.yaml")


@pytest.fixture(scope="module")
def manifests(chart: Chart, values: dict[str, Any]) -> dict[str, Manifest]:
    """Objects that Helm renders, by kind and name."""
    documents = rendered(chart, values)
    names = [f"{document['kind']}/{document['metadata']['name']}" for document in documents]
    assert len(names) == len(set(names))
    return dict(zip(names, documents, strict=True))


@pytest.fixture(scope="module")
def engine(manifests: dict[str, Manifest]) -> Manifest:
    """The pods of vLLM."""
    template: Manifest = manifests[ENGINE]["spec"]["template"]
    return template


@pytest.fixture(scope="module")
def server(engine: Manifest) -> Manifest:
    """The one container in them."""
    container: Manifest
    (container,) = engine["spec"]["containers"]
    return container


def of_kind(manifests: dict[str, Manifest], kind: str) -> list[Manifest]:
    """All objects of a kind."""
    return [manifest for manifest in manifests.values() if manifest["kind"] == kind]


def selects(selector: dict[str, str], manifest: Manifest) -> bool:
    """Whether labels select objects with the labels of `manifest`."""
    labels: dict[str, str] = manifest["metadata"]["labels"]
    return selector.items() <= labels.items()


def others(values: Any) -> Iterator[tuple[str, Any]]:
    """The values with one of them changed, for each of them, with its path."""
    if not isinstance(values, dict | list):
        changed = not values if isinstance(values, bool) else values + ("x" if isinstance(values, str) else 1)
        yield "", changed
        return
    for key, part in list(values.items() if isinstance(values, dict) else enumerate(values)):
        for path, changed in others(part):
            whole = copy.copy(values)
            whole[key] = changed
            yield f"/{key}{path}", whole


def test_the_chart_accepts_the_values(chart: Chart, values: dict[str, Any]) -> None:
    # The chart's schema has one trigger there, KEDA and the chart's own guide have a list, and the template copies it.
    triggers = "servingEngineSpec/modelSpec/0/keda/triggers"
    assert complaints(Path(FOLDER), chart, values) <= {triggers}
    broken = copy.deepcopy(values)
    broken["servingEngineSpec"]["modelSpec"][0]["requestCPU"] = "8"
    assert "servingEngineSpec/modelSpec/0/requestCPU" in complaints(Path(FOLDER), chart, broken)


def test_every_value_shows(chart: Chart, values: dict[str, Any]) -> None:
    """The schema lets unknown keys pass, so a name that is misspelt or has gone would be lost in silence."""
    once = rendered(chart, values)
    assert [path for path, changed in others(values) if rendered(chart, changed) == once] == []


def test_kubernetes_accepts_what_is_rendered(manifests: dict[str, Manifest]) -> None:
    own = [manifest for manifest in manifests.values() if manifest["kind"] not in CUSTOM]
    kinds = {manifest["kind"] for manifest in own}
    assert kinds >= {"Deployment", "Service", "PersistentVolumeClaim", "Role", "RoleBinding"}
    for manifest in own:
        validate(manifest)


def test_vllm_is_started_with_our_settings(server: Manifest) -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from ficoco_vllm.compat.versions import make_arg_parser

    assert server["image"] == f"registry.example.com/ficoco-vllm:gpu-{__version__}"
    assert server["command"][:3] == ["vllm", "serve", MODEL]
    given = make_arg_parser(FlexibleArgumentParser()).parse_args(server["command"][2:])
    assert given.port == server["ports"][0]["containerPort"]
    assert (given.enable_prefix_caching, given.max_model_len) == (True, 4096)
    settings = FicocoConfig.parse(given.additional_config["ficoco"])
    assert (settings.method, settings.keep) == ("ficoco-v", 64)
    environment = {entry["name"]: entry.get("value") for entry in server["env"]}
    assert len(environment) == len(server["env"])
    assert environment["VLLM_PLUGINS"] == "ficoco,ficoco_endpoint"
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert environment["PROMETHEUS_MULTIPROC_DIR"] == "/tmp"


def test_the_user_of_the_image_owns_the_models(
    manifests: dict[str, Manifest], engine: Manifest, server: Manifest
) -> None:
    assert engine["spec"]["securityContext"] == {"runAsUser": 2000, "fsGroup": 2000}
    assert server["securityContext"]["runAsNonRoot"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert engine["spec"]["runtimeClassName"] == "nvidia"
    (mount,) = server["volumeMounts"]
    (volume,) = engine["spec"]["volumes"]
    assert mount["name"] == volume["name"]
    assert {"name": "HF_HOME", "value": mount["mountPath"]} in server["env"]
    (claim,) = of_kind(manifests, "PersistentVolumeClaim")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]  # replicas on several nodes share it


def test_probes_ask_for_health(server: Manifest) -> None:
    port = server["ports"][0]["containerPort"]
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert server[name]["httpGet"] == {"path": "/health", "port": port}
    assert server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"] == 1800


def test_the_monitor_finds_the_metrics(
    manifests: dict[str, Manifest], engine: Manifest, server: Manifest
) -> None:
    (monitor,) = of_kind(manifests, "ServiceMonitor")
    selector = monitor["spec"]["selector"]["matchLabels"]
    (service,) = (matches for matches in of_kind(manifests, "Service") if selects(selector, matches))
    assert selects(service["spec"]["selector"], engine)
    (endpoint,) = monitor["spec"]["endpoints"]
    (port,) = (port for port in service["spec"]["ports"] if port["name"] == endpoint["port"])
    assert port["targetPort"] == server["ports"][0]["name"]
    # Prometheus Operator refuses a monitor that waits for longer than until the next scrape.
    assert int(endpoint["scrapeTimeout"].removesuffix("s")) <= int(endpoint["interval"].removesuffix("s"))


def test_scaling_finds_its_deployment(manifests: dict[str, Manifest]) -> None:
    (scaled,) = of_kind(manifests, "ScaledObject")
    target = scaled["spec"]["scaleTargetRef"]
    assert f"{target['kind']}/{target['name']}" == ENGINE
    assert target["apiVersion"] == manifests[ENGINE]["apiVersion"]
    assert scaled["metadata"]["namespace"] == manifests[ENGINE]["metadata"]["namespace"] == "llava"
    assert (scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"]) == (1, 8)
    assert "replicas" not in manifests[ENGINE]["spec"]  # an update would undo what KEDA did


@needs_prometheus
def test_scaling_counts_what_waits_at_all_replicas(manifests: dict[str, Manifest], tmp_path: Path) -> None:
    """KEDA takes no query of which Prometheus makes several series, such as one of each replica."""
    (scaled,) = of_kind(manifests, "ScaledObject")
    (trigger,) = scaled["spec"]["triggers"]
    assert (trigger["type"], trigger["metadata"]["threshold"]) == ("prometheus", "5")
    replicas = [
        {"series": f'vllm:num_requests_waiting{{model_name="{MODEL}", engine="0", pod="{pod}"}}', "values": 3}
        for pod in ("a", "b")
    ]
    expected = {"expr": trigger["metadata"]["query"], "exp_samples": [{"labels": "{}", "value": 6}]}
    file = tmp_path / "scaling.yml"
    file.write_text(yaml.safe_dump({"tests": [{"input_series": replicas, "promql_expr_test": [expected]}]}))
    result = promtool("test", "rules", str(file))
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_router_finds_the_servers(manifests: dict[str, Manifest], engine: Manifest) -> None:
    router = manifests[ROUTER]["spec"]
    assert router["replicas"] == 1
    (container,) = router["template"]["spec"]["containers"]
    given = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
    assert (given["--service-discovery"], given["--k8s-namespace"]) == ("k8s", RELEASE["namespace"])
    assert (given["--routing-logic"], given["--session-key"]) == ("session", "x-user-id")
    selector = dict(label.split("=") for label in given["--k8s-label-selector"].split(","))
    assert selects(selector, engine)
    assert not selects(selector, router["template"])
    (service,) = (
        matches
        for matches in of_kind(manifests, "Service")
        if selects(matches["spec"]["selector"], router["template"])
    )
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["containerPort"]


def test_the_router_may_list_pods(manifests: dict[str, Manifest]) -> None:
    account = manifests[ROUTER]["spec"]["template"]["spec"]["serviceAccountName"]
    assert f"ServiceAccount/{account}" in manifests
    (binding,) = of_kind(manifests, "RoleBinding")
    assert [subject["name"] for subject in binding["subjects"]] == [account]
    rules = manifests[f"Role/{binding['roleRef']['name']}"]["rules"]
    assert any("pods" in rule["resources"] and {"list", "watch"} <= set(rule["verbs"]) for rule in rules)
