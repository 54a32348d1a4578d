"""The only place that prints. Results go to stdout; progress, notes and warnings to stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """What the user should know, beside the result."""
    err.print(f"[yellow]note[/]  {escape(text)}")


class Bar:
    """A progress bar for one stage."""

    def __init__(self, progress: Progress, name: str):
        self._progress, self._name = progress, name
        self._task = progress.add_task(f"{name:<9}", total=None, detail="")
        self.notes: list[str] = []

    def total(self, steps: int, what: str = "") -> None:
        """Say how many steps there are in all, and of what."""
        self._progress.update(self._task, total=steps, completed=0, detail=what)

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(self._task, steps)

    def note(self, text: str) -> None:
        """A warning that the user should read; it is kept in the stage's manifest too."""
        self.notes.append(text)
        self._progress.console.print(f"[yellow]note[/]  {self._name}: {escape(text)}")

    def done(self) -> None:
        task = self._progress.tasks[self._task]
        total = task.total or 1
        self._progress.update(self._task, total=total, completed=total, detail="")


@contextmanager
def bar(name: str) -> Iterator[Bar]:
    """Show a progress bar for the stage `name` on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, console=err) as progress:
        shown = Bar(progress, name)
        yield shown
        shown.done()


def log(line: str) -> None:
    """A line of progress on stderr where that is no terminal, which has a bar instead."""
    if not err.is_terminal:
        err.print(line, markup=False)


@contextmanager
def starting(what: str) -> Iterator[None]:
    """Say what is being waited for, on stderr; a clock runs beside it where that is a terminal."""
    if not err.is_terminal:
        err.print(what, markup=False)
        yield
        return
    columns = (TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        progress.add_task(what, total=None)
        yield
