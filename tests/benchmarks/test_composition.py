"""The search over compositions: what it may compose, that it halves, that its scores are those of the endpoint."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.composition.__main__ import RESULTS, bars, change, unseen
from benchmarks.composition.candidates import variants
from benchmarks.composition.scoring import Score
from benchmarks.composition.search import Rung, at, first_of_each, halve
from ficoco_vllm.benchmarks.accuracy.client import Endpoint, replay
from ficoco_vllm.benchmarks.accuracy.statistics import paired_bootstrap, paired_bootstrap_of_means
from ficoco_vllm.benchmarks.accuracy.store import Store
from ficoco_vllm.benchmarks.accuracy.suites import KEEPS
from ficoco_vllm.benchmarks.accuracy.variants import Variant, full
from ficoco_vllm.benchmarks.accuracy.workload import Item, embedded
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.tower import VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction import get
from ficoco_vllm.reduction.schedule import default_start_layer
from tests.support.server import API_KEY, Server

ROOT = Path(__file__).parents[2]
TOWER = TowerShape(grid=(24, 24), num_layers=8, num_executed_layers=7, with_cls=False)
QUESTIONS = [Item(f"{kind}-{index}", kind, "?", bytes([index])) for kind in "ab" for index in range(8)]


def test_known_methods_are_among_the_compositions() -> None:
    found = variants(VisionPlanner.shared(FicocoConfig(method="ficoco-v"), TOWER), KEEPS)
    assert len({variant.key for variant in found}) == len(found) > 80
    stages = {
        (
            variant.method,
            *(variant.settings[kind] for kind in ("filter", "correlate", "compress")),
            variant.settings.get("schedule"),
            variant.settings.get("start_layer"),
        )
        for variant in found
    }
    assert ("ficoco-v", "local_task", "attention", "quantile_merge", "even", 3) in stages  # FiCoCo-V
    assert ("topk-cls", "max_min_distance", "none", "prune", None, None) in stages  # DivPrune
    # ToMe's filter gives away half at most in one call, so it cannot take 512 of 576 at once.
    assert not any(filter == "key_similarity" and when == "one-shot" for _, filter, *_, when, _ in stages)
    for variant in found:
        assert variant.method is not None
        get(variant.method).configure(**variant.settings)


def test_search_finds_the_best_and_asks_the_others_little() -> None:
    truth = {f"v{index}": -0.1 * (index + 1) for index in range(16)}
    rng = np.random.default_rng(0)
    asked: dict[str, int] = dict.fromkeys(truth, 0)

    def ask(jobs: Sequence[tuple[Variant, Item]]) -> list[Score]:
        for variant, _ in jobs:
            asked[variant.label] += 1
        return [Score(truth[variant.label] + 0.02 * rng.standard_normal(), True) for variant, _ in jobs]

    contenders = [Variant(name, "tower", "tome", None, {"schedule": name}) for name in truth]
    rungs = (Rung((64,), 2, 8), Rung((128, 64), 4, 2), Rung((128, 64), 8, 1))
    rounds = halve(contenders[::-1], QUESTIONS, rungs, ask)
    assert [len(ranked) for ranked in rounds] == [16, 8, 2]
    assert rounds[-1][0].variant.label == "v0"
    assert rounds[-1][0].accuracy == 1.0
    # Two types; what an earlier round asked is not asked again.
    assert asked["v0"] == 2 * 8 * 2
    assert asked["v15"] == 2 * 2


def test_the_preset_is_what_the_committed_search_found_and_won_with() -> None:
    """Clear of 0 against FiCoCo-V at each budget of the paper, on the split that the search never saw."""
    result = json.loads(RESULTS.read_text())
    winner = result["winner"]
    stages = {kind: winner["settings"][kind] for kind in ("filter", "correlate", "compress")}
    best, searched = get("best"), get(winner["method"]).configure(**stages).method
    assert (best.site, best.default_schedule) == (searched.site, winner["settings"]["schedule"])
    assert winner["settings"]["start_layer"] == default_start_layer(TOWER.num_layers)
    for kind in stages:
        assert getattr(best, kind) is getattr(searched, kind)
    assert {row["keep"] for row in result["test"] if row["against"] == "ficoco-v"} >= set(KEEPS)
    assert len(bars(result)) >= 2 * len(KEEPS)
    assert all(bar.passed for bar in bars(result))
    # A winner that drops at random would have lost to what it is held against.
    for row in result["test"]:
        row["accuracy"]["interval"] = [-high for high in reversed(row["accuracy"]["interval"])]
    assert not any(bar.passed for bar in bars(result) if "ficoco-v" in bar.name)
    assert not all(bar.passed for bar in bars(result) if "tome" in bar.name)


def test_questions_of_the_test_show_no_image_of_the_search() -> None:
    searched = embedded(("shape",), 30, seed=101)
    tested = embedded(("shape",), 300, seed=202)
    fresh = unseen(tested, searched)
    assert 0 < len(fresh) < len(tested), "without a common image nothing is shown"
    assert not {item.image for item in fresh} & {item.image for item in searched}
    assert first_of_each(QUESTIONS, 1) == [QUESTIONS[0], QUESTIONS[8]]


def test_bootstrap_of_means_is_that_of_shares_for_ones_and_zeros() -> None:
    rng = np.random.default_rng(2)
    before = {kind: list(rng.random(60) < 0.9) for kind in "ab"}
    after = {kind: list(rng.random(60) < share) for kind, share in zip("ab", (0.9, 0.6), strict=True)}
    numbers = [
        {kind: [float(v) for v in values] for kind, values in side.items()} for side in (before, after)
    ]
    # Quantiles of 4,000 draws on both sides; see test_statistics.py.
    assert paired_bootstrap_of_means(*numbers) == pytest.approx(paired_bootstrap(before, after), abs=0.015)


_SCORE = """
import json, sys, tempfile
from pathlib import Path
from benchmarks.composition.scoring import Scorer
from tests.benchmarks.test_composition import JOBS, UNASKED, VARIANTS
with tempfile.TemporaryDirectory() as folder:
    scorer = Scorer(VARIANTS, Path(folder), Path(sys.argv[1]))
    scores = scorer.score(JOBS)
    honest = scorer._prompt
    def secretly_off(variant, item):
        prompt, num_answer = honest(variant, item)
        return {**prompt, "mm_processor_kwargs": {"ficoco_keep": 576}}, num_answer
    scorer._prompt = secretly_off
    try:
        scorer.score([(UNASKED, JOBS[0][1])])
    except RuntimeError as error:
        print(error)
"""
UNASKED = Variant("not asked before", "tower", "tome", 128)
VARIANTS = [
    Variant("pruned", "tower", "ficoco-v", 64, {"compress": "prune"}),
    Variant("random", "tower", "random", 32),
    full("tower"),
]
JOBS = [
    (variant, item) for variant in VARIANTS for item in embedded(("number_by_colour_3", "shape"), 3, seed=7)
]


@pytest.mark.server
def test_scores_are_those_of_the_endpoint(server: Server, tmp_path: Path) -> None:
    """Teacher forcing says "right" where the endpoint, asked the same, answers exactly so.

    An engine that secretly does not reduce ends the run; a method that drops at random is worse beyond chance.
    """
    path = tmp_path / "scores.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", _SCORE, str(path)], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(JOBS)
    assert "not asked before: 576 visual tokens were left, not 128" in done.stdout
    scores = {
        variant.label: [Score(row["logprob"], row["right"]) for row in rows if row["variant"] == variant.key]
        for variant in VARIANTS
    }
    items = [item for variant, item in JOBS if variant is VARIANTS[0]]
    assert change(items, [(scores["full"], scores["random"])])["logprob"]["interval"][1] < 0
    # The shared server knows no variant with settings of its own.
    jobs = [job for job in JOBS if not job[0].settings]
    with Store(tmp_path / "answers.jsonl", {}) as store:
        replay(Endpoint(server.url, "ficoco-demo", 576, API_KEY, num_logprobs=20), jobs, store, 8, "asked")
        rights = []
        for row, (variant, item) in zip(rows, JOBS, strict=True):
            assert (row["variant"], row["item"]) == (variant.key, item.name)
            assert row["logprob"] <= 0
            if variant.settings:
                continue
            reply = store[variant.key, item.name]
            rights.append(reply.text == item.answer)
            assert row["right"] == rights[-1]
    assert any(rights)
    assert not all(rights), "answers that are all right would show nothing"


def test_a_budget_is_part_of_the_key() -> None:
    assert at(VARIANTS[0], 128).key != VARIANTS[0].key
