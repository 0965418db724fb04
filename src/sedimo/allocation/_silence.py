"""Keeps what compiled code prints off the standard output.

HiGHS prints to file descriptor 1 on some instances, whatever its options say, and a caller who asked for
JSON there gets a broken document. Replacing `sys.stdout` does not help against C; this works on the
descriptor itself, and so does not care whether `sys.stdout` has one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

_STDOUT = 1


@contextlib.contextmanager
def silenced_stdout() -> Iterator[None]:
    """Discards everything written to file descriptor 1 in the meantime, by any thread.

    Does nothing when the descriptor is closed. C buffers are flushed on both sides, else the text would
    come out later.
    """
    _flush()
    try:
        saved = os.dup(_STDOUT)
    except OSError:  # closed, as under pythonw or a daemon: there is nothing to protect
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, _STDOUT)
        yield
    finally:
        _flush()
        os.dup2(saved, _STDOUT)
        os.close(sink)
        os.close(saved)


def _flush() -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL("ucrtbase") if sys.platform == "win32" else ctypes.CDLL(None)
        library.fflush(None)
