"""The cheapest signal: relative squared weight error, weighted by a layer's share of the computation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.sensitivity.costs import CostEstimate, build_table
from sedimo.sensitivity.table import SensitivityTable
from sedimo.space import SearchSpace

Weighting = Literal["macs", "plain"]
UNITS = {"macs": "relative weight error, weighted by share of work", "plain": "relative weight error"}


def error_table(
    space: SearchSpace, candidates: Iterable[Candidate], *, weighting: Weighting = "macs"
) -> SensitivityTable:
    """Cost = relative squared weight error times the decision's share of all MACs, or alone (`plain`).

    What that does to any output is not known: costs are no noise powers, and nothing in decibels follows from them.

    Raises:
        InputError: another weighting.
    """
    if weighting not in ("macs", "plain"):
        raise InputError(f"the weighting must be 'macs' or 'plain', got {weighting!r}")
    total = sum(d.macs for d in space.decisions)
    if weighting == "plain" or total == 0:
        shares = {d.name: 1.0 for d in space.decisions}
    else:
        shares = {d.name: d.macs / total for d in space.decisions}

    def estimate(candidate: Candidate) -> CostEstimate:
        share = shares[candidate.decision]
        return CostEstimate(share * candidate.error, share * candidate.standard_error, candidate.n)

    return build_table("error", space, candidates, estimate, {"weighting": weighting}, unit=UNITS[weighting])
