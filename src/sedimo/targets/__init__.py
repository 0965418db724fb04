"""One file per place where results run; `TARGETS` lists them."""

from __future__ import annotations

from sedimo.settings import one_of
from sedimo.targets.diffusers import DIFFUSERS
from sedimo.targets.target import Target

TARGETS: tuple[Target, ...] = (DIFFUSERS,)


def target_named(name: str) -> Target:
    """The target of a name.

    Raises:
        InputError: there is none.
    """
    one_of("the target", [one.name for one in TARGETS])(name)
    return next(one for one in TARGETS if one.name == name)
