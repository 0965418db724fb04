"""Parts of a measurement: saved when they are finished, not measured again, and safe to stop between."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sedimo.measurement.interrupt import StopRequest
from sedimo.measurement.study import Study

Part = TypeVar("Part")


def saved_part(study: Study | None, kind: type[Part], key: str, measure: Callable[[], Part]) -> Part:
    """The part of that name from the study, or measured now and saved there; without a study, measured."""
    part = study.probe(kind, key) if study else None
    if part is None:
        part = measure()
        if study:
            study.put_probe(key, part)
    return part


def check_stop(stop: StopRequest, study: Study | None) -> None:
    """Ends the work when the user asked for it, and says where what was measured is.

    Raises:
        Interrupted: the user asked.
    """
    where = f"saved in {study.path}; run the same command again to go on" if study else "lost; give a study to keep it"
    stop.check(f"interrupted: what was measured is {where}")
