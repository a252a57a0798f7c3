"""Reports for a researcher: pages, CSV, LaTeX, plots and terminal, from made-up and from committed results."""

import csv
import io
import json
import re
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from ficoco_vllm.benchmarks.accuracy.report import page as accuracy_page
from ficoco_vllm.benchmarks.accuracy.workload import Item, embedded
from ficoco_vllm.benchmarks.harness import terminal
from ficoco_vllm.benchmarks.harness.plots import draw, from_zero, legend_above
from ficoco_vllm.benchmarks.harness.report import Page, Section, Table
from ficoco_vllm.benchmarks.harness.results import at_most, read, report
from ficoco_vllm.benchmarks.load.report import page as load_page
from ficoco_vllm.server.cli import main
from tests.reduction.test_registry import blocks, install
from tests.support import browser
from tests.support.answering import answering

ROOT = Path(__file__).parents[2]
KINDS = ("shape", "number")
COUNT = 40
# Visual tokens that the methods of these tests need for a right answer; the second is that of the guide.
NEEDS = {"ficoco-v": 100, "small-norm": 300}
TABLE = Table(
    "costs",
    "Costs & gains of `a_b`",
    ("method", "correct, %", "verdict"),
    [("`a_b`", "99.5 (-0.5: -1.6 to +0.0)", "a < b"), ("*all*", "100.0", "")],
    ["A note on `a_b`."],
)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return embedded(KINDS, COUNT)


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The method of docs/adding-a-method.md, installed as its package."""
    project, folder = tomllib.loads(blocks()["toml"])["project"], tmp_path_factory.mktemp("site")
    ((name, value),) = project["entry-points"]["ficoco_vllm.reductions"].items()
    install(folder, name, value.split(":")[0], blocks()["python"], f"{name} = {value}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield name


@pytest.fixture(scope="module")
def calibrated(
    items: list[Item], third_party: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Folder and output of a calibration in which one method has a safe budget and the other has none."""
    folder, lines, printed = tmp_path_factory.mktemp("calibrated"), [], io.StringIO()
    for item in items:
        (folder / f"{item.name}.png").write_bytes(item.image or b"")
        lines.append(json.dumps({"image": f"{item.name}.png", "prompt": item.question}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    command = ["calibrate", "--data", str(folder / "data.jsonl"), "--methods", f"ficoco-v,{third_party}"]
    command += ["--out", str(folder / "out"), "--target-agreement", "0.9", "--budgets", "288,192,96,64"]
    with answering(items, NEEDS) as (url, _), redirect_stdout(printed):
        assert main([*command, "--url", url]) == 0
    return folder / "out", printed.getvalue()


def test_accuracy_leaves_a_report_in_every_form_with_a_method_of_a_third_party(
    items: list[Item], third_party: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["bench", "accuracy", "--methods", f"ficoco-v,{third_party}", "--keeps", "192,64"]
    command += ["--tables", "methods", "--kinds", ",".join(KINDS), "--count", str(COUNT), "--out", str(out)]
    with answering(items, NEEDS) as (url, answers):
        assert main([*command, "--url", url]) == 0
    # Each budget of each method, all tokens, no image.
    assert len(answers.asked) == len(items) * (2 * 2 + 2)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "BAR accuracy-rows-that-are-not-reduced-as-requested 0 0 PASS"
    assert "| `small-norm` | tower |  | 0.0 (-100.0" in printed.out
    assert f"{len(answers.asked)} of {len(answers.asked)}" in printed.err

    names = {"accuracy.json", "accuracy.html", "accuracy.csv", "accuracy.tex", "accuracy.svg", "change.svg"}
    assert {path.name for path in out.iterdir()} == names | {"answers.jsonl"}
    rows = {
        (row["label"], row["keep"]): row
        for row in csv.DictReader(io.StringIO((out / "accuracy.csv").read_text()))
    }
    assert rows["ficoco-v", "192"] | {"accuracy": "100.0", "change": "0.0"} == rows["ficoco-v", "192"]
    assert rows[third_party, "64"] | {"accuracy": "0.0", "change": "-100.0"} == rows[third_party, "64"]
    assert rows["full", ""]["questions"] == str(len(items))
    assert r"\texttt{small-norm} & tower &" in (out / "accuracy.tex").read_text()
    for name in ("accuracy.html", "accuracy.svg", "change.svg"):
        assert third_party in (out / name).read_text()
    ElementTree.parse(out / "accuracy.svg")


def test_a_row_that_is_not_reduced_misses_the_bar(
    items: list[Item], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "accuracy", "--methods", "ficoco-v", "--keeps", "192", "--tables", "methods"]
    command += ["--kinds", "shape", "--count", "2", "--visual-tokens", "600", "--out", str(tmp_path)]
    with answering(items, NEEDS) as (url, _):
        assert main([*command, "--url", url]) == 1
    printed = capsys.readouterr()
    assert "BAR accuracy-rows-that-are-not-reduced-as-requested 1 0 FAIL" in printed.out
    assert "does not reduce as requested" in printed.err
    assert "does not reduce as requested" in (tmp_path / "accuracy.html").read_text()


@pytest.mark.parametrize("command", [["bench", "accuracy"], ["bench", "load"], ["calibrate", "--data", "x"]])
def test_results_go_to_a_folder(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--out", "build/result.json"])
    assert "'build/result.json' is not allowed; allowed: a folder" in capsys.readouterr().err


def test_calibration_lists_budgets_and_shows_disagreements_of_the_method_that_fails(
    calibrated: tuple[Path, str], third_party: str
) -> None:
    out, printed = calibrated
    report = json.loads((out / "calibration.json").read_text())
    safe, failed = report["methods"]
    assert (safe["safe"]["keep"], failed["safe"]) == (192, None)
    assert (failed["worst_keep"], failed["worst_of"]) == (288, "search")
    assert failed["worst"]
    names = {"json", "html", "csv", "tex"}
    plots = {f"agreement-{entry['method']}.svg" for entry in report["methods"]}
    assert {path.name for path in out.iterdir()} == {f"calibration.{name}" for name in names} | plots | {
        "answers.jsonl"
    }
    assert r"\texttt{small-norm}" in (out / "calibration.tex").read_text()
    for plot in plots:
        ElementTree.parse(out / plot)
    html = (out / "calibration.html").read_text()
    passed, missed = html[html.index("<h2>ficoco-v") :].split("<h2>small-norm")
    assert passed.count("class='case'") == 0
    assert missed.count("class='case'") == len(failed["worst"])
    assert "Worst disagreements at 288 tokens, questions of the search" in missed
    for entry, text in ((safe, passed), (failed, missed)):
        shown = re.findall(r'<th role="rowheader" scope="row">(\d+)</th>', text)
        assert shown == [
            str(keep) for keep in sorted({test["keep"] for test in entry["searched"]}, reverse=True)
        ]
    assert f"{third_party}: no budget is safe; at 288 tokens 0 of 16 answers agree." in printed
    lines = list(csv.DictReader(io.StringIO((out / "calibration.csv").read_text())))
    assert {line["part"] for line in lines} == {"search", "certificate"}
    tested = {(line["method"], line["keep"]): line["safe"] for line in lines if line["part"] == "certificate"}
    assert tested["ficoco-v", "192"] == "True"


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    """Reports of the committed results."""
    return {
        "load": load_page(read("load")),
        "cpu-mode": load_page(read("cpu-mode")),
        "accuracy": accuracy_page(read("accuracy")),
        "accuracy-decoder": accuracy_page(read("accuracy-decoder")),
    }


@pytest.mark.needs(browser.why_missing() is None, f"reports in a browser: {browser.why_missing()}")
@pytest.mark.parametrize("width", [390, 1100, 1600])
def test_nothing_is_cut_at_any_width(
    pages: dict[str, Page], calibrated: tuple[Path, str], width: int, tmp_path: Path
) -> None:
    files = [calibrated[0] / "calibration.html"]
    for name, page in pages.items():
        files.append(tmp_path / f"{name}.html")
        files[-1].write_text(page.html())
    with browser.chromium(tmp_path / "profile", "dark", (width, 900)) as window:
        for file in files:
            window.driver.get(file.as_uri())
            cut = window.run(
                "return [...document.querySelectorAll('body, table, thead, tbody th, td, figure, svg, code, p')]"
                ".filter((e) => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)"
                ".map((e) => e.tagName + ' ' + e.textContent.slice(0, 40))"
            )
            assert cut == [], file.name
            assert window.complaints() == []
            assert (
                window.run("return getComputedStyle(document.querySelector('svg text')).fill")
                != "rgb(0, 0, 0)"
            )


def test_pages_load_nothing_and_have_no_name_twice(pages: dict[str, Page]) -> None:
    for page in pages.values():
        html = page.html()
        assert not re.search(r"""(src|href)=["']?(https?:|//)|url\(["']?http|@import""", html)
        names = re.findall(r'\bid="([^"]+)"', html)
        assert len(names) == len(set(names))


def test_load_report_marks_percentiles_of_too_few_requests_and_compares_with_stock(
    pages: dict[str, Page],
) -> None:
    result = read("load")
    throughput, memory = pages["load"].tables
    cells = {row[0]: dict(zip(throughput.header, row, strict=True)) for row in throughput.rows}
    rates = {(row["server"], row["round"]): row["request_throughput"] for row in result["rows"]}
    gains = [rates["ficoco-v-64", i] / rates["stock", i] for i in range(result["num_rounds"])]
    assert cells["`ficoco-v-64`"]["speed-up"] == f"{median(gains):.2f}x"
    assert cells["`stock`"]["speed-up"] == "1.00x"
    # Eight requests: neither a 90th nor a 99th percentile. 8 x 15 gaps between tokens are enough for both.
    (stock,) = (row for row in result["summary"] if row["server"] == "stock")
    assert cells["`stock`"]["TTFT p50, s"] == f"{stock['ttft_ms_p50'] / 1000:.3f}"
    assert cells["`stock`"]["TTFT p99, s"] == f"{stock['ttft_ms_p99'] / 1000:.3f} †"
    assert cells["`stock`"]["ITL p99, ms"] == f"{stock['itl_ms_p99']:.1f}"
    assert any("8 requests in a round are too few" in note for note in throughput.notes)
    assert [row[-1] for row in memory.rows] == ["0"] * len(result["servers"])
    names = {plot.name for section in pages["load"].sections for plot in section.plots}
    assert names == {"throughput", "ttft", "itl", "kv-cache-0"}


def test_legends_cover_no_axes_and_marks_at_the_edges_are_not_cut() -> None:
    figures: list[Figure] = []

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for index in range(7):
            axes.plot([0, 1, 2], [0, 0.001, 100], "o-", label=f"a server with a long name {index}")
        from_zero(axes)
        legend_above(figure)
        figures.append(figure)

    svg = draw("x", "a < b", (4.8, 3.2), paint).svg
    (figure,) = figures
    (axes,), (legend,) = figure.axes, figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 100
    assert not any(line.get_clip_on() for line in axes.lines)
    assert 'aria-label="a &lt; b"' in svg
    assert "currentColor" in svg
    assert "#000000" not in svg
    ElementTree.fromstring(svg)


def test_a_table_in_every_language() -> None:
    assert TABLE.is_number == [False, True, False]
    assert TABLE.markdown()[2] == "| `a_b` | 99.5 (-0.5: -1.6 to +0.0) | a < b |"
    latex = TABLE.latex()
    assert r"\caption{Costs \& gains of \texttt{a\_b}}" in latex
    assert r"\begin{tabular}{lrl}" in latex
    assert r"method & correct, \% & verdict \\" in latex
    extent = r"99.5\\[-4pt]\tiny ($-$0.5: $-$1.6 to +0.0)\end{tabular}"
    assert rf"\texttt{{a\_b}} & \begin{{tabular}}[t]{{@{{}}r@{{}}}}{extent} & a \textless{{}} b \\" in latex
    assert r"\emph{all} & 100.0 &  \\" in latex
    assert latex.count("rule\n") == 3
    check_latex(latex)
    html = Page("<p>", [], [Section("s", tables=[TABLE])], warnings=["<b>"]).html()
    assert "<code>a_b</code>" in html
    assert "<em>all</em>" in html
    assert "a &lt; b" in html
    assert "&lt;b&gt;" in html
    assert 'data-label="correct, %"' in html


@pytest.mark.parametrize(
    ("name", "page"), [("accuracy", accuracy_page), ("accuracy-decoder", accuracy_page), ("load", load_page)]
)
def test_published_tables_are_latex(name: str, page: Callable[[Any], Page]) -> None:
    for table in page(read(name)).tables:
        check_latex(table.latex())


def check_latex(text: str) -> None:
    """What pdfLaTeX would stop at: braces and environments that do not match, rows of other lengths, letters that it
    does not know. (It compiles these tables; the tests do without it.)
    """
    assert text.isascii()
    bare = re.sub(r"\\\\|\\[&%$#_{}]", "", text)
    depth = 0
    for brace in re.findall("[{}]", bare):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert not re.search("[~^#]", bare)
    assert bare.count("$") % 2 == 0
    environments: list[str] = []
    for kind, name in re.findall(r"\\(begin|end){(\w+)}", bare):
        environments.append(name) if kind == "begin" else environments.remove(name)
    assert environments == []
    columns = len(re.search(r"begin{tabular}{(\w+)}", text)[1])
    cells = re.sub(r"\\[&]|\\begin{tabular}\[t].*?\\end{tabular}", "", text)
    rows = [line for line in cells.splitlines() if line.endswith(r" \\")]
    assert len(rows) > 1
    assert {row.count("&") + 1 for row in rows} == {columns}


@pytest.mark.parametrize("is_terminal", [True, False])
def test_summary_is_coloured_on_a_terminal_and_markdown_elsewhere(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    colours = "standard" if is_terminal else None
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=100, color_system=colours)
    terminal.show([TABLE], ["written"], console=console)
    bars = io.StringIO()
    monkeypatch.setattr(bars, "isatty", lambda: is_terminal)
    with redirect_stdout(bars):
        assert report([at_most("a", 0), at_most("b-with-a-long-name" * 8, 2)]) == 1
    assert ("\x1b[" in bars.getvalue()) is is_terminal
    printed = output.getvalue() + bars.getvalue()
    assert ("\x1b[" in printed) is is_terminal
    assert ("| `a_b` |" in printed) is not is_terminal
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    assert "BAR a 0 0 PASS\n" in plain
    assert f"BAR {'b-with-a-long-name' * 8} 2 0 FAIL\n" in plain


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock's time."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_progress_names_the_time_left(now: list[float]) -> None:
    """At the pace since the first step, before which a server may have started."""
    lines, shown = io.StringIO(), io.StringIO()
    with terminal.Task("questions", 100, 50, Console(file=lines, width=40)) as task:
        now[0] += 500.0
        for _ in range(10):
            task.advance(4)
            now[0] += 20.0
        task.describe("the rest")
        task.advance(10)
    assert lines.getvalue().splitlines()[:3] == [
        "questions: 54 of 100",
        "questions: 58 of 100, about 4 min left",
        "questions: 62 of 100, about 3 min left",
    ]
    assert lines.getvalue().splitlines()[-1] == "the rest: 100 of 100"
    with terminal.Task("questions", 100, 50, Console(file=shown, force_terminal=True, width=100)) as task:
        task.advance(25)
    assert "75/100" in shown.getvalue()


def test_only_make_figures_writes_tracked_files() -> None:
    """Modules that write generated pages run in no other target."""
    makefile = (ROOT / "Makefile").read_text()
    writers = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
        for path in (ROOT / "benchmarks").rglob("*.py")
        if "write_pages(__doc__" in path.read_text()
    ]
    assert {"benchmarks.overview", "benchmarks.accuracy.tables"} <= set(writers)
    targets = re.findall(r"^(bench-[a-z-]+|soak[a-z-]*|figures):.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert len(targets) > 10
    for target, recipe in targets:
        runs = [name for name in writers if f"-m ficoco_vllm.{name}" in recipe]
        assert bool(runs) is (target == "figures"), target
        outs = re.findall(r"--(?:out|answers|json) (\S+)", recipe)
        assert all(out.startswith("build/") for out in outs), target
    ignored = subprocess.run(["git", "check-ignore", "-q", "build/x"], cwd=ROOT, check=False)
    assert ignored.returncode == 0
