"""Talking to people: errors with exit codes, progress bars on standard error."""

from __future__ import annotations

import sqlite3
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sedimo.errors import InputError, MissingExtraError, SedimoError

if TYPE_CHECKING:
    from tqdm import tqdm

_QUIET_SECONDS = 10.0  # between two lines about progress, where no terminal is
EXIT_INPUT, EXIT_STATE, EXIT_EXTRA, EXIT_INTERRUPTED = 3, 4, 5, 130


def run_guarded(work: Callable[[], object], *, verbose: bool) -> object:
    """Runs `work`; an error of ours, or of the system, becomes a message on standard error and its exit code."""
    try:
        return work()
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "interrupted; what was finished is saved, the same command goes on"
        code = EXIT_INTERRUPTED
    except sqlite3.Error as error:
        message, code = f"the study cannot be used: {error}", EXIT_STATE
    except (SedimoError, OSError, UnicodeError) as error:  # no such file, no space, no permission, no text
        if verbose:
            traceback.print_exc()
        message, code = f"{type(error).__name__}: {error}", EXIT_STATE
        if isinstance(error, MissingExtraError):
            code = EXIT_EXTRA
        elif isinstance(error, InputError | OSError | UnicodeError):
            code = EXIT_INPUT
    click.echo(message, err=True)
    raise click.exceptions.Exit(code)


class ConsoleProgress:
    """Progress on standard error, with the time left: a bar on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None

    def start(self, total: int, label: str) -> None:
        """Begins a stage of `total` steps."""
        from tqdm import tqdm

        self.done()
        tqdm.monitor_interval = 0  # no thread that redraws
        more: dict[str, Any] = {"smoothing": 0}  # steps take seconds to minutes: the mean tells best
        if not sys.stderr.isatty():
            shape = "{desc}: {n_fmt} of {total_fmt}, about {remaining} left"
            more |= {"mininterval": _QUIET_SECONDS, "miniters": 1, "bar_format": shape, "file": _Lines(), "position": 0}
        self._bar = tqdm(total=total, desc=label, **more)

    def advance(self, n: int = 1) -> None:
        """`n` more steps are finished."""
        if self._bar is not None:
            self._bar.update(n)

    def done(self) -> None:
        """Ends the stage."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Lines:
    """Standard error as a file in which each new state of a bar is a line of its own."""

    def __init__(self) -> None:
        self._state = ""

    def write(self, text: str) -> None:
        if (state := text.strip()) and state != self._state:
            click.echo(state, err=True)
            self._state = state

    def flush(self) -> None:
        sys.stderr.flush()
