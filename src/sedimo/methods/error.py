"""The cheapest signal: relative squared weight error, weighted by a layer's share of the computation."""

from __future__ import annotations

from collections.abc import Iterable

from sedimo.allocation.program import SEARCHES
from sedimo.allocation.solve import ARGMIN
from sedimo.allocation.table import SensitivityTable, build_table
from sedimo.bank import Bank, Candidate
from sedimo.lab.lab import Lab, seconds_of_estimates
from sedimo.methods.method import Finding, Method, NoKnobs, Price, Task, Words
from sedimo.quant.families.family import CostEstimate
from sedimo.space import SearchSpace

NAME = "error"
UNIT = "relative weight error, weighted by share of work"


def error_table(space: SearchSpace, candidates: Iterable[Candidate]) -> SensitivityTable:
    """Cost = relative squared weight error times the decision's share of all MACs.

    What that does to any output is not known: costs are no noise powers, and nothing in decibels follows from them.
    """
    total = sum(d.macs for d in space.decisions)
    shares = {d.name: d.macs / total if total else 1.0 for d in space.decisions}

    def estimate(candidate: Candidate) -> CostEstimate:
        share = shares[candidate.decision]
        return CostEstimate(share * candidate.error, share * candidate.standard_error, candidate.n)

    return build_table(NAME, space, candidates, estimate, {"weighting": "macs"}, unit=UNIT)


def _price(lab: Lab, _task: Task[NoKnobs]) -> Price:
    """Errors from some output channels, and the chosen formats fitted."""
    return Price(seconds_of_estimates(lab), memory_bytes=16 * max(d.params for d in lab.space.decisions))


def describe(bank: Bank) -> Finding:
    """Costs by weight error, for a recipe that something else decides."""
    return Finding(bank, error_table(bank.space, bank.candidates))


def decided_by(method: str, rule: str) -> str:
    """The method whose costs decided, or the rule, where weight errors only describe what it gave.

    Such rules are a recipe that was given, one format for all, and blocks at 16 bits.
    """
    is_described = method == NAME and rule not in (*SEARCHES, ARGMIN)
    return rule if is_described else method


ERROR = Method(
    name=NAME,
    words=Words(
        summary="squared error of the weights, by their share of the work; runs nothing",
        cost="the squared error of its weights, relative to their size and weighted by its share of the work",
        sees="weights, in seconds, without a pipeline",
        misses="inputs: what an error does to any output",
    ),
    runs_pipeline=False,
    is_blind=True,
    price=_price,
    measure=lambda lab, _task: describe(lab.estimated),
)
