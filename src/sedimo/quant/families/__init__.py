"""The families of number formats, each in a file of its own.

To add one, write its file and put it into `FAMILIES`: parsing, fitting, counting, packing, checkpoints and reports find
it there. Nothing else in the package names a family.
"""

from __future__ import annotations

from sedimo.errors import InputError
from sedimo.quant.families.family import Family
from sedimo.quant.families.fp import FP
from sedimo.quant.families.kmeans import KMA, KMC
from sedimo.quant.families.uaq import UAQ

FAMILIES: tuple[Family, ...] = (UAQ, KMC, KMA, FP)


def family_named(name: str) -> Family:
    """The family of this name."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise InputError(f"no such family of number formats: {name!r}. There are {', '.join(f.name for f in FAMILIES)}.")
