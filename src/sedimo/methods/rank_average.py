"""The mean of ranks by three methods: it looks at their order alone, so that costs of any units can be joined."""

from __future__ import annotations

from sedimo.allocation.combine import rank_average
from sedimo.lab.lab import Lab
from sedimo.methods.ablation import ABLATION
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import Finding, Method, NoKnobs, Price, Task, Traits, Words
from sedimo.methods.sqnr import SQNR

AVERAGED = (JACOBIAN, ABLATION, SQNR)


def _price(lab: Lab, task: Task[NoKnobs]) -> Price:
    return sum((method.price(lab, task) for method in AVERAGED), Price())


def _measure(lab: Lab, task: Task[NoKnobs]) -> Finding:
    found = [method.measure(lab, task) for method in AVERAGED]
    evidence = {kind: one for finding in found for kind, one in finding.evidence.items()}
    return Finding(lab.bank, rank_average([finding.table for finding in found]), evidence=evidence)


RANK_AVERAGE = Method(
    name="rank-average",
    words=Words(
        summary=f"the mean of ranks by {', '.join(method.name for method in AVERAGED)}",
        cost="what the first of several methods gives at the mean of its ranks by all of them",
        sees="an order that several methods agree on",
        misses="how large any difference is",
    ),
    traits=Traits(is_noise=False, n_random=0, contains=tuple(method.name for method in AVERAGED)),
    price=_price,
    measure=_measure,
)
