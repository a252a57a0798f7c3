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

    An earlier run has taken `done` of the `total` steps.
    """

    def __init__(self, label: str, total: int, done: int = 0, console: Console | None = None) -> None:
        self.total, self.done = total, done
        self._console = console or Console(stderr=True)
        self._line = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            get_time=time.monotonic,
            # Steps are slow: the default looks back 30 seconds only.
            speed_estimate_period=3600,
            disable=not self._console.is_terminal,
        )
        self._progress.add_task(label, total=total, completed=done)
        (self._task,) = self._progress.tasks

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def describe(self, label: str) -> None:
        """Say what is being done now."""
        if not self._console.is_terminal:
            self.say(label)
        self._progress.update(self._task.id, description=label)

    def advance(self, steps: int = 1) -> None:
        """Count steps."""
        if not steps:
            return
        self.done += steps
        self._progress.update(self._task.id, completed=self.done)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._line >= LINE_SECONDS or self.done >= self.total):
            self._line = now
            # Since the first step: the time before it is mostly that of a server's start.
            seconds = self._task.time_remaining or 0.0
            left = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
            line = f"{self._task.description}: {self.done} of {self.total}"
            self.say(f"{line}, about {left} left" if seconds else line)

    def say(self, line: str) -> None:
        """Print a line, above the bar."""
        self._console.print(Text(line), soft_wrap=True)


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
