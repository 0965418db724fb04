"""Methods that are made of others, which err in different places, so that together they err less."""

from __future__ import annotations

from sedimo.allocation.combine import geometric_mean, rank_average
from sedimo.lab.lab import Lab
from sedimo.methods.ablation import ABLATION, ablate, price_of_ablation
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import N_RANDOM, Finding, Method, NoKnobs, Price, Task, Words
from sedimo.methods.sqnr import SQNR

AVERAGED = (JACOBIAN, ABLATION, SQNR)


def _combined(lab: Lab, task: Task[NoKnobs]) -> Finding:
    ablation, jacobian = ablate(lab, task, lab.bank), JACOBIAN.measure(lab, task)
    table = geometric_mean(ablation.table, jacobian.table)
    return Finding(lab.bank, table, evidence={**jacobian.evidence, **ablation.evidence})


def _averaged(lab: Lab, task: Task[NoKnobs]) -> Finding:
    """Looks at the order of costs alone, so that those of any units can be joined."""
    found = [method.measure(lab, task) for method in AVERAGED]
    evidence = {kind: one for finding in found for kind, one in finding.evidence.items()}
    return Finding(lab.bank, rank_average([finding.table for finding in found]), evidence=evidence)


COMBINED = Method(
    name="combined",
    words=Words(
        summary="the geometric mean of ablation and jacobian",
        sees="what either of them sees",
        misses="what errors of layers do together",
    ),
    is_noise=True,
    n_random=N_RANDOM,
    contains=(ABLATION.name, JACOBIAN.name),
    price=lambda lab, task: JACOBIAN.price(lab, task) + price_of_ablation(lab, task, is_fitted=True),
    measure=_combined,
)
RANK_AVERAGE = Method(
    name="rank-average",
    words=Words(
        summary=f"the mean of ranks by {', '.join(method.name for method in AVERAGED)}",
        cost="what the first of several methods gives at the mean of its ranks by all of them",
        sees="an order that several methods agree on",
        misses="how large any difference is",
    ),
    contains=tuple(method.name for method in AVERAGED),
    price=lambda lab, task: sum((method.price(lab, task) for method in AVERAGED), Price()),
    measure=_averaged,
)
