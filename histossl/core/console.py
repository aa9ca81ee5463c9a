"""What a person sees in the terminal: lines, tables, panels, progress. Beside the CLI the only importer of rich.

On a terminal and in a notebook progress is a live bar; elsewhere (a log file, a pipe, CI) it is a plain line now and
then. Within `muted` nothing is printed at all.
Everything goes to standard error, so that standard output stays free for what a command was asked to print: `answer`.

Whatever is printed here goes through `_text`: names may hold characters that a terminal obeys, or rich's markup.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from histossl.core.text import shown

console = Console(stderr=True, highlight=False, soft_wrap=False)
answer = Console(highlight=False, soft_wrap=False)
named: list[Callable[[str], str]] = []  # what puts the names of an anonymous workspace in place of its pseudonyms
PLAIN_LINE_EVERY_S = 10.0
NOTEBOOK_EVERY_S = 0.2  # a kernel that sends more often than that stalls its page
SHORT, NAME = 16, 32  # letters of a word, of a row's name, that a table does not break
RESUMED_S = 2.0  # what a bar counts this early was done before


def _plain(text: str) -> str:
    for name in named:
        text = name(text)
    return shown(text)


def _text(text: str, style: str = "") -> Text:
    """One line, as it is: no markup, and what a terminal would obey as escapes."""
    return Text(_plain(text), style)


def say(*lines: str, to: Console | None = None) -> None:
    """Each on a line of its own, not wrapped when piped."""
    to = to or console
    for line in lines:
        to.print(_text(line), soft_wrap=not to.is_terminal)


@contextmanager
def muted(wanted: bool = True) -> Iterator[None]:
    """Within it nothing is printed, warnings neither; errors are raised as ever. The public API calls it `silent`."""
    before, console.quiet = console.quiet, console.quiet or wanted
    try:
        yield
    finally:
        console.quiet = before


def count(number: int, thing: str) -> str:
    """As people write it: 1 file, 2,000 files, 1 batch, 2 batches."""
    plural = "" if number == 1 else "es" if thing.endswith(("s", "ch")) else "s"
    return f"{number:,} {thing}{plural}"


def warn(text: str) -> None:
    console.print(Text.assemble(("warning:", "yellow"), " ", _text(text)), soft_wrap=not console.is_terminal)


def fail(text: str) -> None:
    """The one red line of an error."""
    console.print(Text.assemble(("error:", "bold red"), " ", _text(text)), soft_wrap=True)


def panel(title: str, lines: Sequence[str]) -> None:
    heading, text = _text(title), Text("\n").join(map(_text, lines))
    if console.is_terminal:
        console.print(Panel(text, title=heading, title_align="left", box=box.ROUNDED, padding=(0, 1)))
    else:
        console.print(Text("\n").join([Text.assemble("== ", heading), text]), soft_wrap=True)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    right: Sequence[str] = (),
    to: Console | None = None,
) -> None:
    """`right` names the columns to be set flush right (numbers).

    Where the rows' names (the first column) would have to be broken, each has a line of its own above its row.
    """
    to = to or console
    drawn = Table(title=_text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    columns, right = list(map(_plain, columns)), list(map(_plain, right))
    lines = [["" if cell is None else _plain(str(cell)) for cell in row] for row in rows]
    cells = [list(column) for column in zip(columns, *lines, strict=True)]
    widths = _widths(cells, to.width)
    if widths[0] is not None and max(map(len, cells[0])) > widths[0] and not any(" " in cell for cell in cells[0][1:]):
        _names_apart(title, columns, lines, right, to)
        return
    for name, width in zip(columns, widths, strict=True):
        justify: Literal["left", "right"] = "right" if name in right else "left"
        drawn.add_column(Text(name), justify=justify, overflow="fold", width=width)
    for line in lines:
        drawn.add_row(*map(Text, line))
    to.print(drawn)


def _names_apart(
    title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[str], to: Console
) -> None:
    cells = [list(column) for column in zip(columns, *lines, strict=True)][1:]
    widths = [width or max(map(len, cell)) for cell, width in zip(cells, _widths(cells, to.width - 2), strict=True)]
    to.print(Text.assemble(_text(title, "italic"), f"\n\n {columns[0]}"), soft_wrap=True)
    for number, (name, *rest) in enumerate([columns, *lines]):
        if number:
            to.print(Text(f" {name}"), soft_wrap=True)
        row = Table.grid(padding=(0, 3, 0, 0))
        for column, width in zip(columns[1:], widths, strict=True):
            row.add_column(justify="right" if column in right else "left", overflow="fold", width=width)
        row.add_row(*map(Text, rest))
        to.print(Padding(row, (0, 0, 0, 4)))
        if not number:
            to.print(f" {'─' * (to.width - 2)}")
    to.print()


def _widths(cells: Sequence[Sequence[str]], width: int) -> list[int | None]:
    """Of columns of a table: the widest give way first, down to their longest word, so that only long ones are broken.

    The first column names the row: where it is one word it stays whole if there is room. None: as rich has it.
    """
    widths = [max((len(line) for cell in column for line in cell.splitlines()), default=0) for column in cells]
    longest = [max((len(word) for cell in column for word in cell.split()), default=0) for column in cells]
    least = [min(one, SHORT) for one in longest]
    room = width - 3 * len(cells)
    left = room - sum(least[1:])
    if all(" " not in cell for cell in cells[0][1:]):
        least[0] = longest[0] if longest[0] <= NAME else least[0]
    least[0] = min(least[0], left)
    if sum(widths) <= room or least[0] < 1:
        return [None] * len(cells)
    while sum(widths) > room:
        gives = max((number for number, one in enumerate(widths) if one > least[number]), key=widths.__getitem__)
        widths[gives] -= 1
    return [*widths]


class Bar:
    """Progress of one job of `total` things: a plain line now and then. `note` is a short free text at its end."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit, self.done, self.note = what, total, unit, 0, ""
        self._said = -1
        self._started_s = self._printed_s = time.monotonic()
        self._resumed_at = 0

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self.done += count
        if time.monotonic() - self._started_s < RESUMED_S:
            self._resumed_at = self.done
        if note is not None:
            self.note = note
        self._changed()

    def set_total(self, total: int) -> None:
        self.total = total

    def finish(self) -> None:
        if self._said != self.done:
            self._line()

    def _changed(self) -> None:
        if time.monotonic() - self._printed_s >= PLAIN_LINE_EVERY_S:
            self._line()

    def _line(self) -> None:
        self._printed_s = time.monotonic()
        self._said = self.done
        say(self._text())

    def _text(self) -> str:
        elapsed_s = time.monotonic() - self._started_s
        left = ""
        if self._resumed_at < self.done < self.total:
            left_s = elapsed_s * (self.total - self.done) / (self.done - self._resumed_at)
            left = f", about {_duration(left_s)} left"
        return f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, {elapsed_s:.0f} s{left}  {self.note}".rstrip()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _SilentBar(Bar):
    def _line(self) -> None:
        pass


class _LiveBar(Bar):
    """On a terminal, drawn by rich."""

    def __init__(self, what: str, total: int, unit: str, live: Progress) -> None:
        super().__init__(what, total, unit)
        self._live, self._task = live, live.add_task(_plain(what), total=total, note="")

    def set_total(self, total: int) -> None:
        super().set_total(total)
        self._live.update(self._task, total=total)

    def _changed(self) -> None:
        self._live.update(self._task, completed=self.done, note=_plain(self.note))


class _NotebookBar(Bar):
    """In Jupyter: one bar that is drawn again in its place. It needs IPython, which every kernel has; rich's own bar
    needs ipywidgets as well."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        from IPython.display import HTML, display

        super().__init__(what, total, unit)
        self._html: Callable[[str], object] = HTML
        self._shown = display(HTML(self._drawn()), display_id=True)

    def _changed(self) -> None:
        if time.monotonic() - self._printed_s >= NOTEBOOK_EVERY_S:
            self._line()

    def _line(self) -> None:
        self._printed_s = time.monotonic()
        self._said = self.done
        self._shown.update(self._html(self._drawn()))

    def _drawn(self) -> str:
        bar = f'<progress value="{self.done}" max="{max(1, self.total)}"></progress>'
        return f"{bar} <code>{html.escape(self._text())}</code>"


class _Framed(Progress):
    """The bar in a frame, and the parts of its note below it, in columns: for a run that is watched for hours."""

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            parts = [part for part in task.fields["note"].split(", ") if part]
            figures = Columns([Text(part) for part in parts], padding=(0, 3))
            frame = Group(self.make_tasks_table([task]), figures) if parts else self.make_tasks_table([task])
            yield Panel(frame, box=box.ROUNDED, padding=(0, 1))


@contextmanager
def progress(what: str, total: int, unit: str = "", visible: bool = True, framed: bool = False) -> Iterator[Bar]:
    """`with progress("tiling", 12, "slides") as bar: bar.advance(note="830 tiles/s")`. `visible=False` says nothing.

    `framed`: on a terminal a panel, with the parts of the note (between commas) as figures below the bar.
    """
    if not visible or console.quiet:
        yield _SilentBar(what, total, unit)
        return
    if not console.is_terminal:
        bar = _NotebookBar(what, total, unit) if console.is_jupyter else Bar(what, total, unit)
        yield bar
        bar.finish()
        return
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(_plain(unit), markup=False),
        TimeElapsedColumn(),
    )
    if framed:
        live: Progress = _Framed(*columns, TimeRemainingColumn(), TextColumn("left"), console=console)
    else:
        live = Progress(
            *columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False), console=console
        )
    with live:
        yield _LiveBar(what, total, unit, live)
