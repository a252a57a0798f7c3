"""Results for readers: tables and plots as one HTML page, LaTeX and SVG, and the tables for the terminal."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from ficoco_vllm.benchmarks.harness import pages
from ficoco_vllm.benchmarks.harness.plots import Plot
from ficoco_vllm.benchmarks.harness.results import write

_MARKS = re.compile(r"`([^`]+)`|\*([^*]+)\*")
_NUMBER = re.compile(r"[-+]?\d|-$")
_RANGE = re.compile(r"(.+?) (\(.+\))")
_MINUS = re.compile(r"(?<!\w)-(?=\d)")
_LATEX = str.maketrans(
    {
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "†": r"\textsuperscript{\dag}",
    }
)


@dataclass(frozen=True)
class Table:
    """A table whose cells may hold `code` and *emphasis*, as in Markdown.

    Attributes:
        name: label in LaTeX, without spaces.
        notes: sentences below the table.
    """

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    @property
    def is_number(self) -> list[bool]:
        """Whether a column holds figures, which are aligned to the right."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.header)
        return [all(_NUMBER.match(cell) for cell in cells if cell) and any(cells) for cells in columns]

    def markdown(self) -> list[str]:
        """Lines of Markdown."""
        return pages.table(self.header, self.rows)

    def latex(self) -> str:
        """A float with rules of the package booktabs, no wider than a line: graphicx shrinks it."""
        heading, *lines = (
            " & ".join(map(self._cell, row, self.is_number)) for row in (self.header, *self.rows)
        )
        notes = [rf"  \par\smallskip\footnotesize {_latex(note)}" for note in self.notes]
        return "\n".join(
            [
                r"\begin{table}",
                r"  \centering",
                rf"  \caption{{{_latex(self.caption)}}}",
                rf"  \label{{tab:{self.name}}}",
                r"  \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
                rf"  \begin{{tabular}}{{{''.join('lr'[number] for number in self.is_number)}}}",
                r"    \toprule",
                rf"    {heading} \\",
                r"    \midrule",
                *(rf"    {line} \\" for line in lines),
                r"    \bottomrule",
                r"  \end{tabular}}",
                *notes,
                r"\end{table}",
                "",
            ]
        )

    @staticmethod
    def _cell(text: str, is_number: bool) -> str:
        """A cell in LaTeX; the range in brackets after a figure is small and below it."""
        if not (is_number and (match := _RANGE.fullmatch(text))):
            return _latex(text)
        figure, extent = (_MINUS.sub("$-$", _latex(part)) for part in match.groups())
        return rf"\begin{{tabular}}[t]{{@{{}}r@{{}}}}{figure}\\[-4pt]\tiny {extent}\end{{tabular}}"


@dataclass(frozen=True)
class Section:
    """A part of a page: paragraphs, a command to copy, warnings, plots, tables, and HTML at the end."""

    title: str
    lines: Sequence[str] = ()
    command: str = ""
    warnings: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    extra: Markup = field(default_factory=Markup)


@dataclass(frozen=True)
class Page:
    """A report: its main result, reasons to doubt it, sections, and what it depends on by name."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    warnings: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def tables(self) -> list[Table]:
        """Every table, in the order of the page."""
        return [table for section in self.sections for table in section.tables]

    def html(self) -> str:
        """One file that loads nothing else."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"marked": _html, "figures": _figures, "plain": plain, "safe_svg": Markup}
        return environment.get_template("page.html.jinja").render(page=self)


def save(page: Page, result: Mapping[str, Any], csv: str, folder: Path, name: str) -> str:
    """Write a result as JSON, HTML page, CSV, LaTeX tables and a file for each plot; returns a line that names them."""
    write(result, folder / f"{name}.json")
    texts = {
        f"{name}.html": page.html(),
        f"{name}.csv": csv,
        f"{name}.tex": "\n".join(
            ["% Needs \\usepackage{booktabs,graphicx}.", *(table.latex() for table in page.tables)]
        ),
        **{f"{plot.name}.svg": plot.svg for section in page.sections for plot in section.plots},
    }
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    return f"written to {folder}/: {', '.join([f'{name}.json', *texts])}"


def facts(environment: Mapping[str, Any], **more: object) -> dict[str, str]:
    """What a result depends on: hardware and versions, after what the benchmark adds by name, if it is not empty."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    machine = {"hardware": f"{environment['cores']} cores, {environment['cpu']}", "versions": versions}
    named = {name.replace("_", " "): str(value) for name, value in more.items() if value not in (None, "")}
    return named | machine


def _converted(text: str, code: str, emphasis: str) -> str:
    """Text whose words are already escaped for another language, with its marks in that language, too."""
    return _MARKS.sub(lambda match: code % match[1] if match[1] else emphasis % match[2], text)


def _latex(text: str) -> str:
    return _converted(text.translate(_LATEX), r"\texttt{%s}", r"\emph{%s}")


def _html(text: str) -> Markup:
    return Markup(_converted(str(escape(text)), "<code>%s</code>", "<em>%s</em>"))


def _figures(text: str) -> Markup:
    """A figure and the range in brackets after it, each on one line."""
    if not (match := _RANGE.fullmatch(text)):
        return Markup("<span>{}</span>").format(text) if text else Markup()
    return Markup("<span>{}</span> <span class='range'>{}</span>").format(*match.groups())


def plain(text: str) -> str:
    """Text without its marks."""
    return _converted(text, "%s", "%s")
