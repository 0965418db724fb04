"""One file per way to find what matters; `METHODS` lists them, in the order in which people see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sedimo.errors import InputError
from sedimo.methods.ablation import ABLATION
from sedimo.methods.adjoint import ADJOINT
from sedimo.methods.auto import AUTO
from sedimo.methods.combined import COMBINED, RANK_AVERAGE
from sedimo.methods.error import ERROR
from sedimo.methods.hybrid import HYBRID
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import Method
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


def method_named(text: str, among: Sequence[Method[Any]] | None = None) -> tuple[Method[Any], Format | None]:
    """The method that a text names, with the format of `uniform:kmc4`.

    Raises:
        InputError: no such method or format.
    """
    methods = METHODS if among is None else among
    name, _, written = text.partition(":")
    found = next((m for m in methods if m.name == name), None)
    allows = found is not None and (found.traits.takes_format if written else not found.traits.needs_format)
    if found is None or not allows or (":" in text and not written):
        plain = [m.name for m in methods if not m.traits.takes_format]
        with_format = [f"{m.name}:FORMAT" for m in methods if m.traits.takes_format]
        known = " or ".join([", ".join([*plain, *with_format[:-1]]), *with_format[-1:]])
        raise InputError(f"the method must be one of {known}, got {text!r}")
    return found, Format.parse(written) if written else None
