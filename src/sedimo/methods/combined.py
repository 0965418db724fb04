"""The geometric mean of ablation and first-order noise: the two err in different places, so their mean errs less."""

from __future__ import annotations

from sedimo.allocation.combine import geometric_mean
from sedimo.lab.lab import Lab
from sedimo.methods.ablation import ABLATION, ablate, price_of_ablation
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import Finding, Method, NoKnobs, Price, Task, Traits, Words


def _price(lab: Lab, task: Task[NoKnobs]) -> Price:
    return JACOBIAN.price(lab, task) + price_of_ablation(lab, task, is_fitted=True)


def _measure(lab: Lab, task: Task[NoKnobs]) -> Finding:
    ablation, jacobian = ablate(lab, task, lab.bank), JACOBIAN.measure(lab, task)
    table = geometric_mean(ablation.table, jacobian.table)
    return Finding(lab.bank, table, evidence={**jacobian.evidence, **ablation.evidence})


COMBINED = Method(
    name="combined",
    words=Words(
        summary="the geometric mean of ablation and jacobian",
        sees="what either of them sees",
        misses="what errors of layers do together",
    ),
    traits=Traits(contains=(ABLATION.name, JACOBIAN.name)),
    price=_price,
    measure=_measure,
)
