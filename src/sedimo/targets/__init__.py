"""One file per place where results run; `TARGETS` lists them."""

from __future__ import annotations

from sedimo.settings import one_of
from sedimo.targets.diffusers import DIFFUSERS
from sedimo.targets.target import Target

TARGETS: tuple[Target, ...] = (DIFFUSERS,)


def target_named(name: str, said: str = "the target") -> Target:
    """The target of a name; an error tells what it is by the name `said`.

    Raises:
        InputError: there is none.
    """
    one_of([one.name for one in TARGETS])(name, said)
    return next(one for one in TARGETS if one.name == name)
