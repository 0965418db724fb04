"""The default: what serves best in reasonable time on this machine.

First-order effects on the final latents, with a final of several recipes, if that is quick enough: no other method was
ahead of it on the models that were looked at (docs/results/all-methods.md). Where the sampler has no derivative, or
where that takes too long, the noise of single steps; where nothing can run, or would take too long, weight error.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sedimo.errors import UnsupportedError
from sedimo.lab.lab import PATIENCE_SECONDS, Lab, too_slow, why_too_slow
from sedimo.methods import jacobian
from sedimo.methods.adjoint import ADJOINT, SAMPLES_PER_SEED, AdjointSettings
from sedimo.methods.error import ERROR
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import NO_KNOBS, Method, Price, Resolved, Task, Words


def why_not_differentiated(lab: Lab) -> str | None:
    """Why final latents cannot be differentiated, shown by a short run of one sample; None when they can."""
    search = lab.seeds.search
    short = replace(search.first(1), n_steps=min(2, search.n_steps))
    try:
        lab.pipe.differentiable(short)
    except UnsupportedError as error:
        return str(error)
    return None


def _resolve(lab: Lab, task: Task[Any]) -> Resolved:
    """The method that serves best here, and its price."""
    n_seeds, n_steps, plain = lab.seeds.settings.n_seeds, lab.seeds.settings.n_steps, replace(task, knobs=NO_KNOBS)

    def resort(obstacle: str) -> Resolved:
        return Resolved(ERROR, plain, f"{obstacle}, so weight error has to do", ERROR.price(lab, plain))

    obstacle = lab.why_not_sampled()
    obstacle = obstacle or why_too_slow(lab, round(jacobian.CALL_FACTOR * n_seeds * n_steps), "measuring")
    if obstacle is not None:
        return resort(obstacle)
    obstacle, price = why_not_differentiated(lab), Price()
    for n_samples in () if obstacle else (SAMPLES_PER_SEED * n_seeds, n_seeds):
        wide = replace(_by_effects(task), n_samples=n_samples)
        price = ADJOINT.price(lab, wide)
        if price.seconds <= PATIENCE_SECONDS:
            return Resolved(ADJOINT, wide, "the best that takes less than half an hour", price)
    obstacle = obstacle or too_slow("looking through the whole run", price.seconds)
    price = JACOBIAN.price(lab, plain)
    if price.seconds <= PATIENCE_SECONDS:
        return Resolved(JACOBIAN, plain, f"{obstacle}, so single steps have to do", price)
    return resort(too_slow("measuring", price.seconds))


def _by_effects(task: Task[AdjointSettings]) -> Task[AdjointSettings]:
    """With other rules' recipes as rivals."""
    return replace(task, knobs=replace(task.knobs, is_portfolio=True))


AUTO = Method(
    name="auto",
    words=Words(
        summary="the best that takes less than half an hour: adjoint among rivals, else jacobian, else error",
        cost=ADJOINT.words.cost,
        sees="what adjoint sees; recipes by several rules are measured, uniform ones too, and the best is taken",
        misses="nothing that a measured recipe of another rule would have shown",
    ),
    knobs=AdjointSettings,
    is_noise=True,
    n_random=ADJOINT.n_random,
    treatments=("error_feedback",),
    price=lambda lab, task: _resolve(lab, task).price,
    measure=ADJOINT.measure,
    decide=lambda lab, task, finding: ADJOINT.decide(lab, _by_effects(task), finding),
    resolve=_resolve,
)
