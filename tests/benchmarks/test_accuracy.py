"""`bench accuracy` through a real server: what it writes, that it resumes, and that planted regressions are noticed."""

import json
from pathlib import Path
from typing import Any

import pytest

from ficoco_vllm.benchmarks.accuracy.client import Host
from ficoco_vllm.benchmarks.accuracy.regression import regressions
from ficoco_vllm.benchmarks.accuracy.run import measure
from ficoco_vllm.benchmarks.accuracy.store import Reply, Store
from ficoco_vllm.benchmarks.accuracy.suites import Row
from ficoco_vllm.benchmarks.accuracy.summary import summarise
from ficoco_vllm.benchmarks.accuracy.tables import provenance
from ficoco_vllm.benchmarks.accuracy.variants import Variant, full
from ficoco_vllm.benchmarks.accuracy.workload import Item, embedded
from ficoco_vllm.benchmarks.harness.results import write
from ficoco_vllm.server.cli import main, make_parser
from tests.support.server import API_KEY, Server

COUNT = 8
KINDS = ("number", "number_by_colour_3", "last_digit", "shape", "yes_no_signs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accuracy")


@pytest.fixture(scope="module")
def command(server: Server, folder: Path) -> list[str]:
    return [
        *("bench", "accuracy", "--url", server.url, "--api-key", API_KEY, "--methods", "ficoco-v,topk-cls"),
        *("--keeps", "192,64", "--tables", "methods", "--count", str(COUNT), "--kinds", ",".join(KINDS)),
        *("--out", str(folder)),
    ]


@pytest.fixture(scope="module")
def honest(command: list[str], folder: Path) -> dict[str, Any]:
    """The result of a run against a server that applies the requested method and budget."""
    assert main(command) == 0
    return dict(json.loads((folder / "accuracy.json").read_text()))


@pytest.mark.server
def test_result_has_every_row_with_what_it_rests_on(honest: dict[str, Any]) -> None:
    assert honest["schema"] == 1
    assert honest["warnings"] == []
    assert honest["environment"]["cores"] >= 1
    labels = [(row["label"], row["keep"]) for row in honest["rows"]]
    methods = [(name, keep) for name in ("ficoco-v", "topk-cls") for keep in (192, 64)]
    assert labels == [("no image", None), ("full", None), *methods]
    for row in honest["rows"]:
        assert set(row["kinds"]) == set(KINDS)
        for figures in row["kinds"].values():
            assert figures["count"] == len(figures["right"]) == COUNT
            assert figures["accuracy"] == round(100 * figures["right"].count("1") / COUNT, 1)
            assert figures["interval"][0] <= figures["accuracy"] <= figures["interval"][1]
    by_label = {(row["label"], row["keep"]): row for row in honest["rows"]}
    full_row, small = by_label["full", None], by_label["ficoco-v", 64]
    assert full_row["accuracy"] >= 95
    assert by_label["no image", None]["accuracy"] < 30
    # Both are means, rounded to two places.
    assert full_row["prompt_tokens"] - small["prompt_tokens"] == pytest.approx(512, abs=0.011)
    low, high = small["against_full"]["interval"]
    assert low <= small["against_full"]["change"] <= high < 0


@pytest.mark.server
def test_what_was_answered_is_not_asked_again(
    server: Server, honest: dict[str, Any], command: list[str], folder: Path
) -> None:
    before = server.metric("vllm:request_success_total")
    assert main(command) == 0
    assert server.metric("vllm:request_success_total") == before
    assert json.loads((folder / "accuracy.json").read_text())["rows"] == honest["rows"]


@pytest.mark.server
@pytest.mark.parametrize("table", ["methods"])
def test_a_server_that_secretly_does_not_reduce_is_noticed(
    server: Server, tampered: list[dict[str, Any]], tmp_path: Path, table: str
) -> None:
    tampered.append({"keep": 576})
    result = measure(**_options(server, tmp_path, ("ficoco-v",), count=2))
    assert any(
        "ficoco-v/tower/64" in line and "does not reduce as requested" in line for line in result["warnings"]
    )
    assert any("every answer and log-probability equals" in line for line in result["warnings"])


@pytest.mark.server
def test_a_method_that_drops_at_random_is_noticed(
    server: Server, honest: dict[str, Any], tampered: list[dict[str, Any]], tmp_path: Path
) -> None:
    tampered.append({"method": "random"})
    result = measure(**_options(server, tmp_path, ("topk-cls",), count=COUNT))
    matches = regressions(result, honest)
    assert len(matches) == 1
    assert matches[0].startswith("methods, topk-cls, 64 tokens")


@pytest.mark.server
def test_the_reference_on_the_command_line(
    honest: dict[str, Any], command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    better = json.loads(json.dumps(honest))
    for row in better["rows"]:
        for figures in row["kinds"].values():
            figures["right"] = "1" * COUNT
    write(better, folder / "better.json")
    assert main([*command, "--reference", str(folder / "better.json")]) == 1
    assert "WARNING methods, no image, all tokens" in capsys.readouterr().err
    write(honest, folder / "same.json")
    assert main([*command, "--reference", str(folder / "same.json")]) == 0


@pytest.mark.server
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-key", "wrong"], "requires its API key: --api-key, or VLLM_API_KEY"),
        (["--keeps", "600"], "ficoco.keep = 600 is not allowed"),
        (["--visual-tokens", "600", "--count", "1"], "shorter by [512] tokens, not by 536"),
    ],
)
def test_what_the_server_refuses_is_said_in_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*command, *arguments, "--answers", str(tmp_path / "answers.jsonl")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "on_cpu", "dtype"),
    [
        (Host(), True, "float32"),
        (Host(), False, None),
        (Host(model="other"), True, None),
        (Host(url="http://127.0.0.1:9"), True, None),
        (Host(arguments=("--dtype", "bfloat16")), True, None),
    ],
)
def test_the_result_names_the_type_where_it_is_known(
    host: Host, on_cpu: bool, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table says it too, and also reads results of earlier runs, which have no such field."""
    monkeypatch.setattr("ficoco_vllm.benchmarks.accuracy.client.is_cpu_build", lambda: on_cpu)
    answers = tmp_path / "answers.jsonl"
    result = measure(
        methods=("random",), keeps=(64,), tables=(), kinds=KINDS, count=1, answers=answers, host=host
    )
    assert result["dtype"] == dtype
    expected = f" in {dtype}, seed 0" if dtype else "`, seed 0"
    assert expected in provenance(result)
    del result["dtype"]
    assert "`, seed 0" in provenance(result)


@pytest.mark.parametrize("benchmark", ["accuracy", "load", "lmms"])
def test_the_key_comes_from_where_the_server_s_does(monkeypatch: pytest.MonkeyPatch, benchmark: str) -> None:
    """As for `ficoco-vllm explain` and vLLM itself."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert make_parser(["bench"]).parse_args(["bench", benchmark]).api_key == "secret"


def test_equal_log_probabilities_are_noticed_where_prompts_have_the_same_length(tmp_path: Path) -> None:
    """In the decoder the prompt is not shorter, so only the answers show the reduction."""
    items = [Item(f"a-0-{index}", "a", "?", b"", "yes") for index in range(3)]
    row = Row("methods", "fastv", Variant("fastv", "decoder", "fastv", 64), ("a",))
    for shift, expected in ((0.0, 1), (1e-6, 0)):
        with Store(tmp_path / f"{shift}.jsonl", {}) as store:
            for item in items:
                store.add(full("decoder").key, item.name, Reply("yes", 590, {"yes": -0.1}))
                moved = shift if item is items[-1] else 0.0
                store.add(row.variant.key, item.name, Reply("yes", 590, {"yes": -0.1 - moved}))
            assert len(summarise([row], items, store, 576)["warnings"]) == expected


def test_regressions_need_comparable_runs() -> None:
    run = {"model": "demo", "seed": 0, "workload": "embedded", "num_tokens": 576, "rows": []}
    with pytest.raises(ValueError, match="seed = 1 is not that of the reference, 0"):
        regressions({**run, "seed": 1}, run)


def test_a_smaller_workload_is_the_beginning_of_a_larger_one() -> None:
    small, large = embedded(("shape",), 2), embedded(("shape",), 4)
    assert small == large[:2]
    assert len({item.image for item in large}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "colours"], "kind"),
        (["--tables", "tabel"], "table = 'tabel' is not known"),
        (["--methods", "nothing"], "nothing"),
        (["--sites", "roof"], "site = 'roof' is not allowed; allowed: tower, decoder, both"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["bench", "accuracy", "--answers", str(tmp_path / "a.jsonl"), "--count", "1", *arguments]) == 2
    )
    assert message in capsys.readouterr().err


def _options(server: Server, folder: Path, methods: tuple[str, ...], count: int) -> dict[str, Any]:
    where = {"host": Host(url=server.url, api_key=API_KEY), "answers": folder / "answers.jsonl"}
    return {
        "methods": methods,
        "keeps": (64,),
        "tables": ("methods",),
        "kinds": KINDS,
        "count": count,
        **where,
    }
