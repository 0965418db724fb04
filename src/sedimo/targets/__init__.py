"""One file per place where results run; `TARGETS` lists them."""

from __future__ import annotations

from sedimo.errors import InputError
from sedimo.targets.diffusers import DIFFUSERS
from sedimo.targets.target import Target

TARGETS: tuple[Target, ...] = (DIFFUSERS,)


def target_named(name: str) -> Target:
    """The target of a name.

    Raises:
        InputError: there is none.
    """
    found = next((one for one in TARGETS if one.name == name), None)
    if found is None:
        raise InputError(f"the target must be one of {', '.join(one.name for one in TARGETS)}, got {name!r}")
    return found
