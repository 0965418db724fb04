"""One file per way to find what matters; `METHODS` lists them, in the order in which people see them."""

from __future__ import annotations

from typing import Any

from sedimo.errors import InputError
from sedimo.methods.ablation import ABLATION
from sedimo.methods.adjoint import ADJOINT
from sedimo.methods.auto import AUTO
from sedimo.methods.combined import COMBINED, RANK_AVERAGE
from sedimo.methods.error import ERROR
from sedimo.methods.hybrid import HYBRID
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import Method, listed
from sedimo.methods.modelopt import MODELOPT, MODELOPT_UNSCALED
from sedimo.methods.orthogonality import ORTHOGONALITY, ORTHOGONALITY_LP, ORTHOGONALITY_NOISE
from sedimo.methods.search import SEARCH
from sedimo.methods.sqnr import SQNR
from sedimo.methods.uniform import UNIFORM
from sedimo.quant.formats import Format

METHODS: tuple[Method[Any], ...] = (
    UNIFORM,
    AUTO,
    ERROR,
    ADJOINT,
    JACOBIAN,
    ABLATION,
    COMBINED,
    SQNR,
    ORTHOGONALITY,
    ORTHOGONALITY_LP,
    ORTHOGONALITY_NOISE,
    RANK_AVERAGE,
    SEARCH,
    MODELOPT,
    MODELOPT_UNSCALED,
    HYBRID,
)


def method_named(text: str) -> tuple[Method[Any], Format | None]:
    """The method that a text names, with the format of `uniform:kmc4`.

    Raises:
        InputError: no such method or format.
    """
    name, _, written = text.partition(":")
    found = next((m for m in METHODS if m.name == name), None)
    allows = found is not None and (found.takes_format if written else not found.needs_format)
    if found is None or not allows or (":" in text and not written):
        known = sorted(METHODS, key=lambda m: m.takes_format)
        names = [f"{m.name}:FORMAT" if m.takes_format else m.name for m in known]
        raise InputError(f"the method must be one of {listed(names)}, got {text!r}")
    return found, Format.parse(written) if written else None
