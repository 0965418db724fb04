"""Talking to people: errors with exit codes, progress bars on standard error, tables, JSON."""

from __future__ import annotations

import json
import shlex
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

from sedimo.errors import InputError, MissingExtraError, SedimoError

_SPEED_SECONDS = 1800.0  # how far back to look for the time left: a step may take minutes
EXIT_UNEXPECTED, EXIT_INPUT, EXIT_STATE, EXIT_EXTRA, EXIT_INTERRUPTED = 1, 3, 4, 5, 130


def run_guarded(work: Callable[[], object], *, verbose: bool) -> object:
    """Runs `work`; an error of ours becomes a message on standard error and its exit code."""
    try:
        return work()
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "interrupted; what was finished is saved, the same command goes on"
        _exit(message, EXIT_INTERRUPTED)
    except (OSError, UnicodeError) as error:  # of the system: no such file, no space, no permission, no text
        if verbose:
            traceback.print_exc()
        _exit(f"{type(error).__name__}: {error}", EXIT_INPUT)
    except sqlite3.Error as error:
        _exit(f"the study cannot be used: {error}", EXIT_STATE)
    except SedimoError as error:
        if verbose:
            traceback.print_exc()
        _exit(f"{type(error).__name__}: {error}", exit_code(error))
    return None


def exit_code(error: SedimoError) -> int:
    """The exit code of an error."""
    if isinstance(error, InputError):
        return EXIT_INPUT
    return EXIT_EXTRA if isinstance(error, MissingExtraError) else EXIT_STATE


def _exit(message: str, code: int) -> None:
    click.echo(message, err=True)
    raise click.exceptions.Exit(code)


def command_line() -> str:
    """The command as it was typed, for records."""
    return shlex.join(["sedimo", *sys.argv[1:]])


def print_json(plain: object) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on standard output; columns after the first are aligned right."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)


def duration(seconds: float) -> str:
    """Seconds for people.

    Example:
        >>> duration(3700)
        '1 h 02 min'
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def progress() -> Iterator[ConsoleProgress]:
    """A progress display that is taken away however the work ends."""
    shown = ConsoleProgress()
    try:
        yield shown
    finally:
        shown.done()


class ConsoleProgress:
    """Progress on standard error, with the time left: a bar on a terminal, else a line every ten seconds."""

    QUIET_SECONDS = 10.0

    def __init__(self) -> None:
        self._bar: object | None = None
        self._label, self._total, self._done = "", 0, 0
        self._begin = self._last = 0.0

    def start(self, total: int, label: str) -> None:
        """Begins a stage of `total` steps."""
        self.done()
        self._label, self._total, self._done = label, total, 0
        self._begin = self._last = time.monotonic()
        if sys.stderr.isatty():
            self._bar = _rich_bar(total, label)
        else:
            click.echo(f"{label}: {total} steps", err=True)

    def advance(self, n: int = 1) -> None:
        """`n` more steps are finished."""
        self._done += n
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], n)  # type: ignore[attr-defined]  # rich is loaded lazily
        elif time.monotonic() - self._last > self.QUIET_SECONDS:
            self._last = time.monotonic()
            left = (self._last - self._begin) / self._done * (self._total - self._done)
            click.echo(f"{self._label}: {self._done} of {self._total}, about {duration(left)} left", err=True)

    def done(self) -> None:
        """Ends the stage."""
        if self._bar is None and 0 < self._total == self._done and not sys.stderr.isatty():
            click.echo(f"{self._label}: done", err=True)
        self._total = 0
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]  # rich is loaded lazily
            self._bar = None


def _rich_bar(total: int, label: str) -> object:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        speed_estimate_period=_SPEED_SECONDS,
    )
    bar.add_task(label, total=total)
    bar.start()
    return bar
