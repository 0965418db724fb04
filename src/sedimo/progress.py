"""How far a long work is, for people."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Shows people how far a long work is; stages follow one another."""

    def start(self, total: int, label: str) -> None:
        """Begins a stage of `total` steps."""

    def advance(self, n: int = 1) -> None:
        """`n` more steps are finished."""

    def done(self) -> None:
        """Ends the stage."""


class _Silent:
    def start(self, total: int, label: str) -> None: ...
    def advance(self, n: int = 1) -> None: ...
    def done(self) -> None: ...


SILENT: Progress = _Silent()
