"""A benchmark's output: progress with the time left, and tables, coloured on a terminal."""

import time
from collections.abc import Iterable, Sequence
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable
from rich.text import Text

from ficoco_vllm.benchmarks.harness.report import Table, plain

# Between two lines of progress where there is no terminal to draw a bar on.
LINE_SECONDS = 15.0


class Task:
    """Progress of a task on stderr: a bar with the time left, or where there is no terminal a line now and then.

    Args:
        label: at the beginning of the line.
        total: steps.
        done: steps that an earlier run has taken.
        console: console for the output.
    """

    def __init__(self, label: str, total: int, done: int = 0, console: Console | None = None) -> None:
        self.label, self.total, self.done = label, total, done
        self._console = console or Console(stderr=True)
        self._line = time.monotonic()
        self._first: tuple[int, float] | None = None  # steps and time when the first one was done
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(
            *columns,
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            # Steps are slow: the default looks back 30 seconds only.
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            speed_estimate_period=3600,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(label, total=total, completed=done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def describe(self, label: str) -> None:
        """Say what is being done now."""
        self.label = label
        if not self._console.is_terminal:
            self.say(label)
        self._progress.update(self._task, description=label)

    def advance(self, steps: int = 1) -> None:
        """Count steps."""
        if not steps:
            return
        self.done += steps
        self._progress.update(self._task, completed=self.done)
        now = time.monotonic()
        if self._first is None:
            self._first = self.done, now  # the time before it is mostly that of a server's start
        if not self._console.is_terminal and (now - self._line >= LINE_SECONDS or self.done >= self.total):
            self._line = now
            self.say(f"{self.label}: {self.done} of {self.total}{self._left(now)}")

    def say(self, line: str) -> None:
        """Print a line, above the bar."""
        self._console.print(Text(line), soft_wrap=True)

    def _left(self, now: float) -> str:
        """Time left at the mean pace of this run, in words."""
        first, start = self._first or (self.done, now)
        if self.done == first or self.done >= self.total:
            return ""
        seconds = (now - start) / (self.done - first) * (self.total - self.done)
        return f", about {seconds:.0f} s left" if seconds < 90 else f", about {seconds / 60:.0f} min left"


def show(
    tables: Iterable[Table],
    lines: Sequence[str] = (),
    warnings: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Print tables, then lines: drawn and coloured on a terminal, Markdown elsewhere; warnings on stderr."""
    console = console or Console()
    for table in tables:
        if console.is_terminal:
            console.print(_drawn(table))
        else:
            console.print(Text("\n".join([*table.markdown(), *map(plain, table.notes), ""])), soft_wrap=True)
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    errors = Console(stderr=True)
    for warning in warnings:
        errors.print(Text(f"WARNING {warning}", "bold yellow"), soft_wrap=True)


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(
        title=plain(table.caption),
        title_justify="left",
        title_style="bold",
        caption="\n".join(map(plain, table.notes)) or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name, number in zip(table.header, table.is_number, strict=True):
        drawn.add_column(
            plain(name), justify="right" if number else "left", no_wrap=not number, overflow="fold"
        )
    for row in table.rows:
        drawn.add_row(*map(_cell, row))
    return drawn


def _cell(text: str) -> Text:
    """A cell; of the brackets only a change remains, since intervals and ranges leave no room for other columns."""
    figure, _, interval = text.partition(" (")
    change, colon, _ = interval.partition(":")
    style = "cyan" if text.startswith("`") else "italic" if text.startswith("*") else ""
    return Text.assemble((plain(figure), style), (f" ({change})" if colon else "", "dim"))
