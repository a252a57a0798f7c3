"""Files for Prometheus and Grafana: valid, tested by promtool, with existing metrics only."""

import json
import re
import shutil
from itertools import takewhile
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from ficoco_vllm.metrics.families import Metrics
from tests.support.prometheus import (
    DASHBOARD,
    QUALITY_ROW,
    ROOT,
    filled_in,
    needs_prometheus,
    panels,
    promtool,
    rules,
)

PROMETHEUS = ROOT / "docker" / "prometheus"
GRAFANA = ROOT / "docker" / "grafana"


def families() -> set[str]:
    """Names of all our metrics, with the endings that they have at /metrics."""
    names: set[str] = set()
    for family in Metrics(CollectorRegistry()).__dict__.values():
        names |= {family._name + ending for ending in ENDINGS[family._type]}
    return names


ENDINGS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def used(text: str) -> set[str]:
    return set(re.findall(r"ficoco:[a-z_]+", text))


@needs_prometheus
def test_promtool_accepts_the_configuration() -> None:
    result = promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "13 rules found" in result.stdout


@needs_prometheus
def test_promtool_passes_the_tests_of_the_rules() -> None:
    result = promtool("test", "rules", *map(str, sorted((PROMETHEUS / "tests").glob("*.yml"))))
    assert result.returncode == 0, result.stdout + result.stderr


@needs_prometheus
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("> 0.95", "> 0.98"),
        ("max by (instance, model_name, engine)", "max by (model_name, engine)"),
        ("[30m]) >= 2", "[30m]) >= 4"),
        ('up{job="ficoco-vllm"} == 0', "up == 0"),
        ("rate(vllm:prompt_tokens_total[5m]) + ", ""),
        ('status="5xx"', 'status="4xx"'),
        ("histogram_quantile(0.95", "histogram_quantile(0.5"),
    ],
)
def test_a_wrong_rule_fails_the_tests_of_the_rules(right: str, wrong: str, tmp_path: Path) -> None:
    """The tests of the rules can fail."""
    for name in ("rules", "tests"):
        shutil.copytree(PROMETHEUS / name, tmp_path / name)
    copied = tmp_path / "rules" / "ficoco.yml"
    text = copied.read_text()
    assert right in text
    copied.write_text(text.replace(right, wrong))
    assert promtool("test", "rules", str(tmp_path / "tests" / "ficoco.yml")).returncode != 0


@needs_prometheus
def test_the_agreement_weighs_every_comparison_of_all_instances_alike(tmp_path: Path) -> None:
    """One server agrees in 9 of 10 comparisons, the other in 45 of 90: 54 of 100 together. The mean of both is 0.7."""
    instances = {"a:8000": (9, 10), "b:8000": (45, 90)}
    expression = filled_in(
        panels(QUALITY_ROW)["Agreement with the full model"][0], 300, "m", "|".join(instances)
    )
    series = [
        {
            "series": f'ficoco:{name}{{instance="{instance}", model_name="m", keep="64"}}',
            "values": f"0+{step}x10",
        }
        for instance, steps in instances.items()
        for name, step in zip(("quality_score_total", "quality_comparisons_total"), steps, strict=True)
    ]
    expected = [{"labels": '{keep="64"}', "value": 0.54}]
    query = {"expr": expression, "eval_time": "10m", "exp_samples": expected}
    tests = [{"interval": "1m", "input_series": series, "promql_expr_test": [query]}]
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({"tests": tests}))
    result = promtool("test", "rules", str(tmp_path / "tests.yml"))
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_tested_both_ways() -> None:
    tests = yaml.safe_load((PROMETHEUS / "tests" / "ficoco.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for rule in rules():
        outcomes = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == rule["alert"]}
        assert outcomes == {True, False}, rule["alert"]


def test_every_alert_is_in_the_table() -> None:
    listed = re.findall(r"^\| `(Ficoco\w+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert listed == [rule["alert"] for rule in rules()]


def test_rules_and_scrapes_name_the_same_job() -> None:
    (scrape,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    jobs = set(re.findall(r'job="([^"]+)"', (PROMETHEUS / "rules" / "ficoco.yml").read_text()))
    assert jobs == {scrape["job_name"]}


def test_dashboard_and_rules_name_metrics_that_exist() -> None:
    known = families()
    assert used(DASHBOARD.read_text()) <= known
    assert used((PROMETHEUS / "rules" / "ficoco.yml").read_text()) <= known


def test_every_metric_is_on_the_dashboard_and_in_the_table() -> None:
    shown = used(DASHBOARD.read_text())
    table = (ROOT / "docs" / "metrics.md").read_text()
    for family in Metrics(CollectorRegistry()).__dict__.values():
        names = {family._name + ending for ending in ENDINGS[family._type]}
        assert names & shown, family._name
        name = family._name + ("_total" if family._type == "counter" else "")
        assert f"`{name}`" in table, name
        assert {"model_name", "engine", "method"} <= set(family._labelnames)
    assert used(table) <= known_names()


def known_names() -> set[str]:
    """Names as they may stand in prose: of the series, and of histograms without ending."""
    return families() | {family._name for family in Metrics(CollectorRegistry()).__dict__.values()}


def test_colours_change_where_alerts_are_raised() -> None:
    limits = {rule["alert"]: float(rule["expr"].split()[-1]) for rule in rules()}
    shown = {panel["title"]: panel for panel in json.loads(DASHBOARD.read_text())["panels"]}
    for title, alert in (
        ("KV cache use", "FicocoKVCacheFull"),
        ("KV cache in use", "FicocoKVCacheFull"),
        ("First token, 95th percentile", "FicocoFirstTokenSlow"),
        ("Time to first token", "FicocoFirstTokenSlow"),
        ("Error rate", "FicocoServerErrors"),
        ("Error rate by status", "FicocoServerErrors"),
        ("Preemptions", "FicocoPreemptions"),
    ):
        red = shown[title]["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]
        assert (red["color"], red["value"]) == ("red", limits[alert]), title


def test_the_first_row_has_single_values() -> None:
    first, *rest = json.loads(DASHBOARD.read_text())["panels"]
    assert first["type"] == "row"
    row = [panel["type"] for panel in takewhile(lambda panel: panel["type"] != "row", rest)]
    assert row == ["stat"] * 6


def test_every_series_of_the_dashboard_is_filtered_by_instance() -> None:
    (chosen,) = [
        variable
        for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]
        if variable["name"] == "instance"
    ]
    assert chosen["multi"]
    assert chosen["includeAll"]
    for title, queries in panels().items():
        for query in queries:
            series = re.findall(r"[a-z_]+:[a-z_]+\b|\bhttp_[a-z_]+", query)
            assert series, title
            assert query.count('instance=~"$instance"') == len(series), (title, query)


def test_provisioning_matches_the_dashboard() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    assert len(panels()) == sum(panel["type"] != "row" for panel in dashboard["panels"])  # titles are unique
    assert all(panel.get("description") for panel in dashboard["panels"] if panel["type"] != "row")
    source = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())
    scrape = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["datasources"][0]["jsonData"]["timeInterval"] == scrape
    provider = yaml.safe_load((GRAFANA / "provisioning/dashboards/ficoco.yml").read_text())["providers"][0]
    assert provider["type"] == "file"
