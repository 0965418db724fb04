"""The first-order effect of each format of each decision on the final latents, through the whole sampling run.

For a sample with final latents x and a random u ~ N(0, I), let G be the gradient of <u, x> / ||x|| with respect to a
weight, through all steps, guidance, and the sampler's own arithmetic. A change dW moves the final latents by J dW, and
the mean over u of <G, dW>^2 is ||J dW||^2 / ||x||^2: the relative noise of the final latents, to first order.

What an error does at different steps is added before it is squared, as the sampler does. The looks of one step alone
(see `jacobian.py`) miss that: an error that is the same at every step and every token, such as that of a timestep
embedder, hardly moves one step's output, and pushes the final latents in one direction, step after step.

The products <G, dW> are kept with their signs. The effect of a whole recipe is the sum of the effects of its decisions,
so its noise is the mean square of the sum of their products; where errors of layers point the same way, that is more
than the sum of their squares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from sedimo.allocation.effects import Effects, make_effects
from sedimo.allocation.table import EXACTLY_NOTHING, SensitivityTable, build_table
from sedimo.bank import Candidate
from sedimo.codec import content_key
from sedimo.errors import StateError
from sedimo.lab.exchange import MEMORY_BYTES, passes
from sedimo.lab.lab import Lab, seconds_of_fits
from sedimo.methods.method import Finding, Method, Price, Task, Words, plan_of, price_of_passes
from sedimo.methods.portfolio import N_RUNS, decide_by_effects, hold_portfolio, refine
from sedimo.methods.taps import ChangedDecisions, FirstOrder, MixedRowsError, Numbers, Taps, drawn, kept, over
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.differentiable import CutCall, DifferentiableRun, Tensors, make_again, pull_through
from sedimo.pipelines.trajectory import rows_for, rows_of
from sedimo.quant.formats import FP16
from sedimo.settings import Checked, option, within
from sedimo.space import SearchSpace

NAME = "adjoint"
ADJOINT_VERSION = 1
SAMPLES_PER_SEED = 4  # of the search: products of few samples are cancelled by chance
N_DIRECTIONS, N_DIRECTIONS_COMPENSATED = 4, 2  # compensated errors add up less, so fewer tell enough
CALL_FACTOR = 14.0  # a call with gradients, of inputs too, and inner products in all directions, in plain calls
N_RANDOM = 6  # random recipes that show whether effects add
_DIGITS = 7


@dataclass(frozen=True, slots=True)
class AdjointSettings(Checked):
    """Minutes of exchanges that are measured afterwards; `is_portfolio`: recipes by other rules compete beforehand."""

    minutes: float | None = option(
        None,
        "--minutes",
        check=within(above=0),
        help="After the default method: exchange formats and measure, for so long.",
    )
    is_portfolio: bool = False


@dataclass(frozen=True, slots=True)
class AdjointPart:
    """Of one batch of n samples: the products by decision and change, `[n * directions]`; `unused` decisions."""

    products: Numbers
    unused: tuple[str, ...]


def probe_adjoint(lab: Lab, on: Sampling, *, n_directions: int = N_DIRECTIONS) -> FirstOrder:
    """Signed first-order effects on the final latents of all formats of the lab's bank, on the sampling runs of a plan.

    Each number is the product of the gradient of one sample in one random direction with what the change does, relative
    to the norm of the sample's final latents; those of a sample follow one another. Their mean square is the relative
    noise of the change. With a study, each batch's part is saved when it is finished and not measured again.
    """
    groups = [ChangedDecisions(lab, group) for group in passes(lab.bank.space, MEMORY_BYTES)]

    def works() -> Iterator[tuple[str, Callable[[], AdjointPart]]]:
        for batch in on.batches():
            run = functools.cache(functools.partial(lab.pipe.differentiable, batch))
            named = {"adjoint": ADJOINT_VERSION, "setting": lab.setting(batch), "n_directions": n_directions, "seed": 0}
            for decisions in groups:
                key = content_key({**named, "formats": decisions.names})
                yield key, functools.partial(_measure_part, decisions, run, batch, n_directions)
                if len(groups) > 1:  # memory is for one at a time; the next batch loads them again
                    decisions.forget()

    found: dict[str, dict[str, tuple[float, ...]]] = {}
    used: set[str] = set()
    label = "first-order noise on the final latents"
    for part in lab.parts().each(AdjointPart, label, len(groups) * on.n_batches, works()):
        for decision, changes in part.products.items():
            before = found.setdefault(decision, dict.fromkeys(changes, ()))
            before |= {name: before[name] + values for name, values in changes.items()}
        used |= part.products.keys() - set(part.unused)
    return FirstOrder(lab.setting(on), n_directions, found, tuple(sorted(found.keys() - used)))


def effects_of(candidates: Iterable[Candidate], probe: FirstOrder) -> Effects:
    """The effects of all candidates, from what a probe measured of their weights and inputs."""
    candidates = tuple(candidates)
    changed = [c for c in candidates if c.format != FP16]
    products = {(c.decision, c.format): probe.total(c.decision, c.format.changes) for c in changed}
    return make_effects(products, candidates)


def adjoint_table(space: SearchSpace, candidates: Iterable[Candidate], probe: FirstOrder) -> SensitivityTable:
    """Cost = relative noise power of a typical sample's final latents by a choice alone, to first order.

    The standard error comes from the variation between samples. Within a family of formats (of one group size and one
    width of activations), a format with more bits never costs more: estimates that say otherwise are pooled.
    """
    candidates = tuple(candidates)
    costs = effects_of(candidates, probe).costs
    return build_table(
        NAME,
        space,
        candidates,
        lambda c: costs.get((c.decision, c.format), EXACTLY_NOTHING),
        probe.described(),
        sees_activations=True,
    )


def _measure_part(
    decisions: ChangedDecisions, recorded: Callable[[], DifferentiableRun], batch: Sampling, n_directions: int
) -> AdjointPart:
    """One way back through the run of a batch."""
    run, n = recorded(), len(batch.seeds)
    directions = [_directions(run.latents, batch, number) for number in range(n_directions)]

    def walked(taps: Taps) -> _Walk:
        walk = _Walk(taps, decisions, n)
        run.walk_back(directions, walk.handle)
        return walk

    walk = decisions.tapped(walked)
    unused = tuple(d for d in decisions.names if d in walk.unused)
    decisions.refuse_hidden_use(next(cut.call for cut in run.cuts if cut.network is decisions.denoiser), unused)
    boost = math.sqrt(run.latents[0].numel())
    found = {}
    for decision, names in decisions.names.items():
        values = walk.totals.get(decision, np.zeros((n_directions, n, len(names)))) / boost
        columns = values.transpose(2, 1, 0).reshape(len(names), -1)  # [changes, n * directions]
        found[decision] = kept(names, columns.tolist(), _DIGITS)
    return AdjointPart(found, unused)


class _Walk:
    """What is collected on the way back through a run: products `[directions, n, changes]` by decision."""

    def __init__(self, taps: Taps, decisions: ChangedDecisions, n_samples: int) -> None:
        self._taps, self._decisions, self._n = taps, decisions, n_samples
        self.totals: dict[str, npt.NDArray[np.float64]] = {}
        self.unused = set(decisions.names)

    def handle(self, cut: CutCall, gradients: Sequence[Tensors]) -> Sequence[Tensors]:
        """Makes a call of the denoiser again, some samples at a time, and adds the products of its layers."""
        if cut.network is not self._decisions.denoiser:
            return pull_through(cut, gradients)
        n_rows = len(cut.call.output)
        if n_rows % self._n:
            raise StateError(f"a call of {n_rows} rows does not fit a batch of {self._n} samples")
        answers: list[Tensors] = [[None] * len(cut.places) for _ in gradients]
        samples = torch.arange(self._n, device=cut.call.output.device)
        for units in torch.split(samples, max(1, self._decisions.max_rows * self._n // n_rows)):
            rows = rows_for(units, self._n, n_rows // self._n)
            self._taps.begin(cut.call.output.device, cut.call.timestep)
            outputs, entries = make_again(cut, rows_of(cut.call, rows))
            self.unused.intersection_update(self._taps.unused)
            for number, (one, answer) in enumerate(zip(gradients, answers, strict=True)):
                given = [g[rows] if g is not None and g.ndim and len(g) == n_rows else g for g in one]
                products, found = self._taps.products(outputs, given, n_samples=len(units), entries=entries)
                self._add(products, units, number, len(gradients))
                for place, part in enumerate(found):
                    if part is not None:
                        answer[place] = _joined(answer[place], part, cut.entries[place], rows, n_rows)
        return answers

    def _add(self, products: Mapping[str, torch.Tensor], units: torch.Tensor, number: int, n_directions: int) -> None:
        for decision, values in products.items():
            if len(values) != len(units):
                raise MixedRowsError(f"rows of {decision} belong to several samples")
            total = self.totals.setdefault(decision, np.zeros((n_directions, self._n, values.shape[1])))
            total[number, units.cpu().numpy()] += values.cpu().numpy()


def _joined(
    before: torch.Tensor | None, part: torch.Tensor, entry: torch.Tensor, rows: torch.Tensor, n_rows: int
) -> torch.Tensor:
    """The gradient of a whole input from those of some rows; parts of an input without rows are added."""
    total = torch.zeros_like(entry) if before is None else before
    total[rows if entry.ndim and len(entry) == n_rows else ...] += part
    return total


def _directions(latents: torch.Tensor, batch: Sampling, number: int) -> torch.Tensor:
    """Random u on the final latents of each sample, divided by their root mean square, `[B, ...]`.

    That keeps gradients near 1, within the range of half precision; a sample's u does not depend on its batch.
    """
    plain = latents.detach().float()
    found = torch.stack([drawn(f"sedimo adjoint 0 {seed} {number}", plain.shape[1:]) for seed in batch.seeds])
    levels = plain.flatten(1).square().mean(1).sqrt()
    return over(found, levels, of="the final latents", remedy="sample: error").to(latents.dtype)


def _plan(lab: Lab, task: Task[AdjointSettings]) -> Sampling:
    return plan_of(lab, task, SAMPLES_PER_SEED * lab.seeds.settings.n_seeds)


def _price(lab: Lab, task: Task[AdjointSettings]) -> Price:
    """Every format fitted, runs of more samples gone back through, recipes of a portfolio measured, exchanges."""
    timing = lab.time_calls(lab.seeds.search)
    run = price_of_passes(lab.space, timing, CALL_FACTOR)
    measured = round(N_RUNS * timing.n_calls) if task.knobs.is_portfolio else 0
    share = max(1.0, len(_plan(lab, task).seeds) / lab.seeds.settings.n_seeds)
    seconds = share * run.seconds + measured * timing.seconds_per_call + seconds_of_fits(lab)
    seconds += 60 * (task.knobs.minutes or 0.0)
    return Price(seconds, round(share * run.n_calls) + measured, run.memory_bytes)


def _measure(lab: Lab, task: Task[AdjointSettings]) -> Finding:
    bank = lab.bank
    n_directions = N_DIRECTIONS if bank.moments is None else N_DIRECTIONS_COMPENSATED
    probe = probe_adjoint(lab, _plan(lab, task), n_directions=n_directions)
    table = adjoint_table(bank.space, bank.candidates, probe)
    return Finding(bank, table).with_evidence(probe, effects_of(bank.candidates, probe))


def _decide(lab: Lab, task: Task[AdjointSettings], finding: Finding) -> Finding:
    """By signed effects, or the best of several rules' recipes; then exchanges that are measured."""
    if task.knobs.is_portfolio:
        found = hold_portfolio(lab, finding, task.budget)
    else:
        found = decide_by_effects(finding, task.budget)
    if task.knobs.minutes is not None:
        found = refine(lab, found, finding, task.budget, on=_plan(lab, task), minutes=task.knobs.minutes)
    return replace(finding, allocation=found.allocation).with_evidence(found)


ADJOINT = Method(
    name=NAME,
    words=Words(
        summary="noise of the final latents, to first order, through the whole sampling run, with signs",
        cost="what its rounding does to the final latents through the whole sampling run, to first order",
        sees="what errors of layers and steps do together, because products keep their signs",
        misses="what is not of first order: formats of two bits, samplers without a derivative",
    ),
    knobs=AdjointSettings,
    is_noise=True,
    n_random=N_RANDOM,
    price=_price,
    price_of_prior=functools.partial(price_of_passes, call_factor=CALL_FACTOR),
    measure=_measure,
    decide=_decide,
)
