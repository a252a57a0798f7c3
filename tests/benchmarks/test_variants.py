"""Variants, the package that offers them, and the tables that they stand in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ficoco_vllm.benchmarks.accuracy.client import by_server
from ficoco_vllm.benchmarks.accuracy.suites import TABLES, methods_of, rows
from ficoco_vllm.benchmarks.accuracy.variant_package import PACKAGE, with_defaults, write_package
from ficoco_vllm.benchmarks.accuracy.variants import NO_IMAGE, SITES, Variant, full, site_of
from ficoco_vllm.benchmarks.accuracy.workload import KINDS, embedded
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction import get
from ficoco_vllm.reduction.pipeline import PIPELINES

# The demo model's.
TOWER = TowerShape(grid=(24, 24), num_layers=8, num_executed_layers=7, with_cls=False)
NUM_LAYERS = 8
METHODS = methods_of(SITES)
ROWS = rows(METHODS, (288, 192, 128, 64), TABLES, KINDS)
(ITEM,) = embedded(("colour",), 1, 0)


def test_every_served_method_is_compared() -> None:
    assert {"ficoco-v", "random", "trim", "fastv", "sparsevlm", "ficoco-vl"} <= set(METHODS)


def test_each_method_is_asked_of_a_server_that_runs_it() -> None:
    """A server whose method reduces twice refuses every other one."""
    groups = by_server((row.variant, ITEM) for row in ROWS)
    assert set(groups) == {"ficoco-v", "ficoco-l", *PIPELINES}
    assert sum(map(len, groups.values())) == len(ROWS)
    for server, jobs in groups.items():
        methods = {variant.method for variant, _ in jobs if variant.method is not None}
        if server in PIPELINES:
            assert methods == {server}
        else:
            assert len(methods) > 1
            assert {site_of(method) for method in methods} == {site_of(server)}


def test_rows_of_one_table_differ() -> None:
    for table in TABLES:
        result = [(row.label, row.variant.key) for row in ROWS if row.table == table]
        assert len(set(result)) == len(result), table


def test_a_setting_at_its_default_is_the_method_itself() -> None:
    by_label = {(row.table, row.label): row.variant for row in ROWS}
    plain = by_label["ablation-v", "FiCoCo-V"]
    assert by_label["sensitivity-v", "lam = 0.35"] == plain
    assert by_label["sensitivity-v", "epsilon = 0.998"].key == "ficoco-v/tower/64"
    assert by_label["sensitivity-v", "lam = 0.5"].key != plain.key


def test_variants_have_the_settings_as_defaults() -> None:
    settings = {"lam": 0.5, "window": (3, 3), "schedule": "geometric", "compress": "prune"}
    method = with_defaults("bench-x", "ficoco-v", settings)
    plain, given = method.configure(), get("ficoco-v").configure(**settings)
    assert plain.settings.model_dump() == given.settings.model_dump()
    assert plain.method.compress is given.method.compress
    assert plain.signals == given.signals
    assert method.default_schedule == "geometric"
    with pytest.raises(ValueError, match="lam = 7"):
        with_defaults("bench-x", "ficoco-v", {"lam": 7})


def test_every_variant_can_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = write_package(tmp_path, [row.variant for row in ROWS])
    monkeypatch.syspath_prepend(environment["PYTHONPATH"].split(os.pathsep)[0])
    tower = VisionPlanner.shared(FicocoConfig(method="ficoco-v"), TOWER)
    decoder = DecoderPlanner.shared(FicocoConfig(method="ficoco-l"), NUM_LAYERS, 576)
    for variant in {row.variant.key: row.variant for row in ROWS}.values():
        if variant.served_name is None or variant.site == "both":
            continue
        assert variant.keep is not None
        if variant.site == "tower":
            tower.plan(Budget(variant.served_name, variant.keep))
        else:
            assert decoder.counts(variant.served_name, 576, variant.keep)[-1] == variant.keep


def test_another_process_finds_the_variants(tmp_path: Path) -> None:
    variant = Variant("x", "tower", "ficoco-v", 64, {"lam": 0.5})
    environment = write_package(tmp_path, [variant, Variant("ficoco-v", "tower", "ficoco-v", 64)])
    entries = tmp_path / f"{PACKAGE}-1.0.dist-info" / "entry_points.txt"
    assert len(entries.read_text().splitlines()) == 2, (
        "the group, and the one method with settings of its own"
    )
    code = (
        f"from ficoco_vllm.reduction import get; print(get({variant.served_name!r}).configure().settings.lam)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "0.5"


def test_fields_of_a_request() -> None:
    assert Variant("a", "tower", "tome", 64).fields() == {"ficoco": {"method": "tome", "keep": 64}}
    assert Variant("a", "both", "ficoco-vl", 64).fields() == {"ficoco": {"method": "ficoco-vl", "keep": 64}}
    changed = Variant("a", "decoder", "fastv", 64, {"schedule": "even"})
    assert changed.fields() == {"ficoco": {"method": changed.served_name, "keep": 64}}
    assert full("tower").fields() == full("decoder").fields() == {"ficoco": "off"}
    assert Variant(NO_IMAGE, "tower").fields() == {}


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(ValueError, match="table = 'tabel' is not known; allowed: methods, ablation-v"):
        rows(METHODS, (64,), ("tabel",), KINDS)
