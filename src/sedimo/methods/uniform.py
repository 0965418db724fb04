"""One format for all decisions: the one that is named, or the best of about the budget's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sedimo.allocation.budget import NO_BUDGET, allocated
from sedimo.lab.lab import Lab
from sedimo.methods.error import ERROR, describe
from sedimo.methods.method import Finding, Method, NoKnobs, Price, Task, Words
from sedimo.quant.formats import Format
from sedimo.space import SearchSpace

NAME = "uniform"
SLACK_BITS = 0.1  # by which a uniform recipe may be larger than what it is compared with


def _formats(space: SearchSpace) -> Sequence[Format]:
    """Those that all decisions can take, or all that there are where no format suits all."""
    quantized = {f for d in space.decisions for f in d.formats if f.is_quantized}
    return space.common_formats or sorted(quantized, key=str)


def _price(lab: Lab, task: Task[NoKnobs]) -> Price:
    """Nothing where the format is named; else each format is fitted and measured, and full precision."""
    if task.number_format is not None:
        return Price()
    timing = lab.time_calls(lab.seeds.search)
    n_calls = (1 + len(_formats(lab.space))) * timing.n_calls
    return Price(n_calls * timing.seconds_per_call, n_calls)


def _measure(lab: Lab, task: Task[NoKnobs]) -> Finding:
    return describe(lab.estimated if task.number_format is not None else lab.any_bank)


def _decide(lab: Lab, task: Task[NoKnobs], finding: Finding) -> Finding:
    """The named format; else the recipe of about the budget's size that is best on the searched seeds."""
    if task.number_format is not None:
        allocation = allocated(finding.table, task.budget, rule=f"{NAME}:{task.number_format}")
        return replace(finding, allocation=allocation)
    space, budget = finding.bank.space, task.budget
    most = budget.in_bits(space.params) + SLACK_BITS
    most_bops = space.full_bops if budget.bops is None else budget.bops.resolved(space.full_bops)
    uniform = [allocated(finding.table, NO_BUDGET, rule=f"{NAME}:{f}") for f in _formats(space)]
    fitting = [u for u in uniform if u.paper_bits <= most and space.bops(u.recipe) <= most_bops]
    if not fitting:
        limit = "" if budget.bops is None else f" and {most_bops} bit operations"
        return replace(finding, notes=(f"left out: no uniform format takes at most {most:.2f} bits per weight{limit}",))
    trials = lab.measure([one.recipe for one in fitting], lab.seeds.search)
    _, best = max(zip(trials, fitting, strict=True), key=lambda pair: pair[0].score)
    return replace(finding, allocation=best, notes=best.notes)


UNIFORM = Method(
    name=NAME,
    words=Words(
        summary="one format for all (uniform:FORMAT), or the best one of about the budget's size",
        sees="whole recipes as they are measured",
        misses="that layers differ",
        given="The recipe was ordered: {} for all layers that can take it.",
    ),
    runs_pipeline=False,
    is_described=True,
    takes_format=True,
    told_as=ERROR.name,
    price=_price,
    measure=_measure,
    decide=_decide,
)
