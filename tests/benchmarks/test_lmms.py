"""The harness around lmms-eval, end to end with a task of its own format that needs no download."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ficoco_vllm.benchmarks.accuracy import probe as module
from ficoco_vllm.benchmarks.accuracy.probe import probe
from ficoco_vllm.benchmarks.accuracy.workload import Item, embedded
from ficoco_vllm.benchmarks.lmms.benchmarks import BENCHMARKS, PAPER, Benchmark, paper_figure
from ficoco_vllm.benchmarks.lmms.command import evaluate, read_results, table, tasks_folder
from ficoco_vllm.benchmarks.lmms.tasks import MEAN_COLOUR, pad_to_square, write_task
from tests.support.server import API_KEY, Server, data_url, message

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("FICOCO_LMMS_PYTHON", ROOT / ".venv-lmms/bin/python"))
needs_lmms = pytest.mark.needs(
    PYTHON.exists(), "the tests of `bench lmms`: no lmms-eval (`make lmms` installs it)"
)


@pytest.fixture(scope="module")
def questions() -> list[Item]:
    return embedded(("number_by_colour_3", "shape"), 6, seed=3)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, questions: list[Item]) -> Path:
    folder = tmp_path_factory.mktemp("task")
    rows = []
    for item in questions:
        image = folder / f"{item.name}.png"
        image.write_bytes(item.image or b"")
        rows.append({"question": item.question, "answer": item.answer, "image": str(image)})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(ROOT / "tests/benchmarks/lmms_task/signs.py", folder)
    template = (ROOT / "tests/benchmarks/lmms_task/signs.yaml").read_text()
    (folder / "signs.yaml").write_text(template.replace("DATA", str(data)))
    return folder / "signs.yaml"


@pytest.mark.long
@needs_lmms
@pytest.mark.server
def test_a_local_task_scores_what_the_server_answers(
    server: Server, task: Path, questions: list[Item], tmp_path: Path
) -> None:
    answers = []
    for item in questions:
        answer = server.client().chat.completions.create(
            model="ficoco-demo",
            temperature=0,
            max_tokens=16,
            messages=[message(item.question, [data_url(item.image or b"")])],
        )
        answers.append((answer.choices[0].message.content or "").strip() == item.answer)
    assert any(answers)
    assert not all(answers), "questions that are all answered would not show a harness that always says yes"
    benchmark = Benchmark("Signs", str(task), "exact")
    result = evaluate("signs", benchmark, PYTHON, url=server.url, api_key=API_KEY, method="ficoco-v", keep=64)
    assert result["count"] == len(questions)
    assert result["measured"] == pytest.approx(100 * sum(answers) / len(answers), abs=0.01)
    (tmp_path / "signs.json").write_text(json.dumps(result))
    assert f"| signs | demo | ficoco-v | 64 | {len(questions)} |" in table(read_results(tmp_path))[2]


@pytest.mark.server
@pytest.mark.parametrize(
    ("method", "keep", "plain", "doubt"),
    [
        ("ficoco-v", 64, {}, None),
        ("ficoco-v", None, {}, None),
        ("ficoco-v", 128, {}, "keeps 64 visual tokens, not 128"),
        ("tome", 64, {}, "reduces by ficoco-v, not by tome"),
        (None, None, {}, "reduces by ficoco-v, not by off"),
        (None, None, {"ficoco": "off"}, None),
        ("ficoco-v", 64, {"ficoco": "off"}, "reduces by off, not by ficoco-v"),  # secretly off
        ("ficoco-v", 64, {"ficoco": {"method": "random"}}, "reduces by random, not by ficoco-v"),
    ],
)
def test_a_server_that_does_something_else_is_noticed_before_any_benchmark(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    method: str | None,
    keep: int | None,
    plain: dict[str, Any],
    doubt: str | None,
) -> None:
    monkeypatch.setattr("ficoco_vllm.benchmarks.accuracy.probe.PLAIN", plain)
    matches = probe(server.url, API_KEY, method, keep)
    assert len(matches) == (doubt is not None)
    assert doubt is None or doubt in matches[0]


@pytest.mark.server
def test_a_server_that_tells_what_it_does_not_do_is_noticed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reported usage is checked against the prompt's length and the log-probabilities."""
    reported = {"method": "ficoco-v", "visual_tokens": 576, "visual_tokens_kept": 64}
    original = module._ask

    def pretending(client: Any, name: str, fields: Any) -> Any:
        answer = original(client, name, {"ficoco": "off"})
        answer.usage.ficoco = reported
        return answer

    monkeypatch.setattr(module, "_ask", pretending)
    assert (
        "shorter by 0 tokens than without reduction, not by 512"
        in probe(server.url, API_KEY, "ficoco-v", 64)[0]
    )
    reported["method"] = "fastv"  # in the decoder the prompt is no shorter
    assert "log-probabilities are those without" in probe(server.url, API_KEY, "fastv", 64)[0]


@pytest.mark.long
@needs_lmms
@pytest.mark.server
def test_a_question_without_an_answer_is_no_wrong_answer(server: Server, task: Path) -> None:
    benchmark = Benchmark("Signs", str(task), "exact", specific={"pre_prompt": "word " * 5000})
    with pytest.raises(RuntimeError, match="questions were not answered"):
        evaluate(
            "signs",
            benchmark,
            PYTHON,
            url=server.url,
            api_key=API_KEY,
            method="ficoco-v",
            keep=64,
            limit=1,
        )


@pytest.mark.long
@needs_lmms
def test_every_benchmark_is_a_task_of_lmms_eval() -> None:
    folder = tasks_folder(PYTHON)
    for benchmark in BENCHMARKS.values():
        text = (folder / benchmark.file).read_text()
        assert benchmark.task in text
        template = [line.split()[1] for line in text.splitlines() if line.startswith("include:")]
        text += "".join((folder / benchmark.file).with_name(name).read_text() for name in template)
        assert f"metric: {benchmark.metric}" in text
        # We pad where lmms-eval's own settings for LLaVA do not ask for the original.
        assert benchmark.pad == ("image_aspect_ratio: original" not in text), benchmark.title


def test_a_task_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.yaml.*allowed"):
        write_task(tmp_path, tmp_path / "nothing.yaml", "nothing", True, {})


def test_a_missing_environment_says_how_to_make_it() -> None:
    with pytest.raises(ValueError, match="make lmms"):
        evaluate("pope", BENCHMARKS["pope"], Path("/nowhere/python"))


def test_padding_keeps_every_pixel() -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    square = pad_to_square(wide)
    assert square.size == (40, 40)
    assert square.getpixel((0, 0)) == MEAN_COLOUR
    assert square.crop((0, 10, 40, 30)).tobytes() == wide.tobytes()
    assert pad_to_square(square).tobytes() == square.tobytes()


def test_figures_of_the_paper() -> None:
    assert all(len(row) == len(BENCHMARKS) for row in PAPER.values())
    assert paper_figure("textvqa", "ficoco-v", 64) == 55.5
    assert paper_figure("pope", None, None) == 86.4
    assert paper_figure("pope", "tome", 64) is None
