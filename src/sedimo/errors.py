"""Every exception that Sedimo raises on purpose.

    SedimoError
    ├── InputError          the caller's fault: a wrong value, file, name or budget (also a ValueError)
    │   └── UnfitFormatError  a number format whose parameters overflow for a weight
    ├── StateError          stored data contradicts itself: a damaged, foreign or outdated file
    ├── UnsupportedError    an operation that a packed weight refuses instead of doing it wrongly
    └── MissingExtraError   an optional dependency is not installed; names the extra
    Interrupted             the user stopped the work; what was finished is saved (a KeyboardInterrupt)

A message tells the rule, the value found, the place (layer, file) and the remedy.
"""

from __future__ import annotations


class SedimoError(Exception):
    """Base of all errors that Sedimo raises on purpose."""


class InputError(SedimoError, ValueError):
    """The caller passed something that cannot be used."""


class UnfitFormatError(InputError):
    """A number format cannot hold the values of a weight."""


class StateError(SedimoError, RuntimeError):
    """Stored data contradicts itself or does not belong here."""


class UnsupportedError(SedimoError, NotImplementedError):
    """A packed weight was asked for an operation that it does not know."""


class MissingExtraError(SedimoError, ImportError):
    """An optional dependency is missing."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        """Names the missing `package`, the `extra` that brings it, and what it is needed for."""
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'sedimo[{extra}]'"
        )


class Interrupted(KeyboardInterrupt):
    """The user stopped the work; what was finished is saved, and the message says how to resume."""
