"""The first-order noise that each format of each decision puts on the denoiser's output, ||J dW||^2.

For sample s, step t and a random u ~ N(0, I) on the output, let G be the gradient of <u, output> with respect to
a weight, for that sample alone. The mean over u of <G, dW>^2 is exactly ||J dW||^2, so the squared inner products
are averaged over steps and a few u. All decisions and formats come from one recorded trajectory.

Where guidance computes a sample in several rows, u is put on the prediction that the scheduler makes of them, if the
trajectory shows how (see `guidance.py`). Else, and without `combine_rows`, each row counts as a sample of its own,
relative to the power of its own output, and a sample's value is the mean over its rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sedimo.allocation.costs import CostEstimate, build_table, mean_cost
from sedimo.allocation.table import SensitivityTable
from sedimo.bank import Candidate
from sedimo.codec import content_key
from sedimo.errors import InputError
from sedimo.lab.exchange import MEMORY_BYTES, passes
from sedimo.lab.lab import Lab, seconds_of_fits
from sedimo.lab.study import Execution, Setting
from sedimo.lab.trials import CallTiming
from sedimo.methods.guidance import find_row_weights
from sedimo.methods.method import Finding, Method, NoKnobs, Price, Task, Traits, Words, plan_of, price_of_passes
from sedimo.methods.taps import TappedDecisions, Taps, drawn
from sedimo.metrics.estimate import to_digits
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import batches_of, output_tensor, rows_for, rows_of
from sedimo.space import SearchSpace

CALL_FACTOR = 12.0  # a call with gradients and inner products in all directions, in plain calls
NAME = "jacobian"
JACOBIAN_VERSION = 1
_DIGITS = 8
Noise = Mapping[str, Mapping[str, tuple[float, ...]]]


@dataclass(frozen=True, slots=True)
class JacobianOptions:
    """How precisely, and in how much memory.

    `n_directions` random directions per call from `seed`; weight changes of as many decisions at a time as fit in
    `memory_bytes`; `max_rows` of a call at a time. `combine_rows` looks at guided rows as the
    sampler does, together; else each counts for itself.
    """

    n_directions: int = 4
    seed: int = 0
    memory_bytes: int = MEMORY_BYTES
    max_rows: int = 64
    combine_rows: bool = True


@dataclass(frozen=True, slots=True)
class JacobianPart:
    """Of one recorded call: relative noise of its samples by decision and format text; `unused` decisions."""

    noise: Noise
    unused: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JacobianProbe:
    """Relative noise power per sample, averaged over steps and directions, by decision and format text.

    `unused` decisions were never called by the denoiser on this trajectory; their noise is 0. `row_weights` say how
    a sample's rows were combined; `(1.0,)` when each counted for itself.
    """

    setting: Setting
    n_directions: int
    seed: int
    row_weights: tuple[float, ...]
    noise: Noise
    unused: tuple[str, ...]
    execution: Execution


def probe_jacobian(lab: Lab, on: Sampling, *, options: JacobianOptions | None = None) -> JacobianProbe:
    """Measures all decisions and formats of the lab's bank on one recorded trajectory.

    With a study, each call's part is saved when it is finished and not measured again.

    Raises:
        InputError: an output that is zero or not finite.
        Interrupted: the user stopped it (with a study, calling again goes on).
        UnsupportedError: a weight is used in a way that hooks on its layer do not see.
    """
    options, parts, setting = options or JacobianOptions(), lab.parts(), lab.setting(on, "step")
    trajectory = parts.trajectory(on, setting)
    calls = tuple(batches_of(on, trajectory.calls))
    weights = (find_row_weights(trajectory) if options.combine_rows else None) or (1.0,)
    groups = passes(lab.bank.space, options.memory_bytes)

    def works() -> Iterator[tuple[str, Callable[[], JacobianPart]]]:
        for decisions in groups:
            one = _Pass(lab, decisions, options, weights)
            for index, (call, samples) in enumerate(calls):
                yield one.key(setting, index), functools.partial(one.measure, call, index, len(samples))

    totals = _Totals(len(on.seeds))
    found = parts.each(JacobianPart, "first-order noise", len(groups) * len(calls), works())
    for part, (_, samples) in zip(found, calls * len(groups), strict=True):
        totals.add(part, samples)
    return JacobianProbe(
        setting=setting,
        n_directions=options.n_directions,
        seed=options.seed,
        row_weights=weights,
        noise=totals.noise(),
        unused=totals.unused,
        execution=parts.execution,
    )


def jacobian_table(space: SearchSpace, candidates: Iterable[Candidate], probe: JacobianProbe) -> SensitivityTable:
    """Cost = mean over samples of the noise relative to the output's power, averaged over steps and directions.

    Rounded activations add their own noise to that of the weight: the two errors are independent to first order.

    The standard error comes from the variation between samples.

    Raises:
        InputError: the probe was made for other decisions or formats.
    """

    def estimate(candidate: Candidate) -> CostEstimate:
        noise, names = probe.noise.get(candidate.decision, {}), candidate.format.changes
        if not noise.keys() >= set(names):
            raise InputError(
                f"the probe has no {candidate.decision} at {candidate.format}; measure it again for this space"
            )
        return mean_cost(np.sum([noise[name] for name in names], axis=0))

    setting = probe.setting
    settings = {
        "n_samples": str(len(setting.seeds)),
        "n_steps": str(setting.n_steps),
        "n_directions": str(probe.n_directions),
        "row_weights": ", ".join(f"{w:.2f}" for w in probe.row_weights),
        "unused_decisions": ", ".join(probe.unused) or "none",
    }
    return build_table(NAME, space, candidates, estimate, settings, sees_activations=True)


class _Pass:
    """One way through the trajectory, for the decisions whose weight changes are in memory together."""

    def __init__(
        self, lab: Lab, decisions: Sequence[str], options: JacobianOptions, weights: tuple[float, ...]
    ) -> None:
        self._decisions, self._options, self._weights = TappedDecisions(lab, decisions), options, weights

    def key(self, setting: Setting, index: int) -> str:
        return content_key(
            {
                "jacobian": JACOBIAN_VERSION,
                "setting": setting,
                "call": index,
                "n_directions": self._options.n_directions,
                "seed": self._options.seed,
                **({} if self._weights == (1.0,) else {"row_weights": [f"{w:.3f}" for w in self._weights]}),
                "formats": self._decisions.names,
            }
        )

    def measure(self, call: DenoiserCall, index: int, n_samples: int) -> JacobianPart:
        """The part of one call."""
        plan = _RowPlan(call, self._weights)
        directions = _directions(plan, index, self._options)
        squares, unused = self._decisions.tapped(lambda taps: self._squares(taps, plan, directions))
        self._decisions.refuse_hidden_use(call, unused)
        noise = {}
        for decision, formats in self._decisions.names.items():
            found = squares.get(decision, torch.zeros(plan.n_units, len(formats), dtype=torch.float64))
            means = found.reshape(-1, n_samples, len(formats)).mean(0).T.tolist()
            noise[decision] = {f: tuple(to_digits(v, _DIGITS) for v in m) for f, m in zip(formats, means, strict=True)}
        return JacobianPart(noise, unused)

    def _squares(
        self, taps: Taps, plan: _RowPlan, directions: Sequence[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
        """Mean over directions of the squared inner products, `[units, F]` by decision; decisions not called."""
        found: dict[str, list[torch.Tensor]] = {}
        for units in plan.slices(self._options.max_rows):
            taps.begin(plan.call.output.device, plan.call.timestep)
            rows = plan.rows(units)
            with torch.enable_grad():
                output = output_tensor(self._decisions.denoiser(**rows_of(plan.call, rows)))
            for decision, squares in _mean_squares(taps, output, [d[rows] for d in directions], len(units)).items():
                found.setdefault(decision, []).append(squares)
        return {d: torch.cat(parts) for d, parts in found.items()}, taps.unused


class _RowPlan:
    """Which rows of a call are measured together: the units are samples, or rows when they stay apart."""

    def __init__(self, call: DenoiserCall, weights: tuple[float, ...]) -> None:
        self.call, self.weights = call, weights
        self.n_units = call.output.shape[0] // len(weights)

    def slices(self, max_rows: int) -> list[range]:
        """Units at a time."""
        step = max(1, max_rows // len(self.weights))
        return [range(i, min(i + step, self.n_units)) for i in range(0, self.n_units, step)]

    def rows(self, units: range) -> torch.Tensor:
        """Positions of the rows of some units, first rows first."""
        first = torch.arange(units.start, units.stop, device=self.call.output.device)
        return rows_for(first, self.n_units, len(self.weights))

    def combined(self) -> torch.Tensor:
        """The prediction of each unit, float32 `[units, ...]`."""
        rows = self.call.output.float().reshape(len(self.weights), self.n_units, *self.call.output.shape[1:])
        return torch.einsum("k,ku...->u...", torch.tensor(self.weights, device=rows.device), rows)

    def spread(self, direction: torch.Tensor) -> torch.Tensor:
        """A direction on the predictions as one on the rows."""
        return torch.cat([weight * direction for weight in self.weights])


class _Totals:
    """Sums of parts over calls, by decision and format."""

    def __init__(self, n_samples: int) -> None:
        self._n_samples = n_samples
        self._sums: dict[tuple[str, str], np.ndarray] = {}
        self._counts: dict[tuple[str, str], np.ndarray] = {}
        self._used: set[str] = set()

    def add(self, part: JacobianPart, samples: range) -> None:
        for decision, formats in part.noise.items():
            for text, values in formats.items():
                key = (decision, text)
                sums = self._sums.setdefault(key, np.zeros(self._n_samples))
                counts = self._counts.setdefault(key, np.zeros(self._n_samples))
                sums[samples.start : samples.stop] += values
                counts[samples.start : samples.stop] += 1
        self._used |= part.noise.keys() - set(part.unused)

    def noise(self) -> dict[str, dict[str, tuple[float, ...]]]:
        found: dict[str, dict[str, tuple[float, ...]]] = {}
        for (decision, text), sums in self._sums.items():
            found.setdefault(decision, {})[text] = tuple((sums / self._counts[decision, text]).tolist())
        return found

    @property
    def unused(self) -> tuple[str, ...]:
        return tuple(sorted({d for d, _ in self._sums} - self._used))


def _directions(plan: _RowPlan, index: int, options: JacobianOptions) -> list[torch.Tensor]:
    """Random u on the predictions, divided by their norms and spread over the rows, `[R, ...]` each."""
    prediction = plan.combined()
    norms = prediction.flatten(1).norm(dim=1)
    wrong = norms[~(norms > 0) | norms.isinf()]
    if len(wrong):
        raise InputError(
            f"noise is measured beside the output, whose norm must be positive and finite, but at timestep "
            f"{plan.call.timestep:g} it is {float(wrong[0]):g} for a sample. Repair "
            "the checkpoint, or take a method that does not look at the output: error, or sqnr"
        )
    found = []
    for number in range(options.n_directions):
        direction = drawn(f"sedimo direction {options.seed} {index} {number}", prediction.shape).to(prediction.device)
        found.append(plan.spread(direction / norms.reshape(-1, *[1] * (prediction.ndim - 1))))
    return found


def _mean_squares(
    taps: Taps, output: torch.Tensor, directions: Sequence[torch.Tensor], n_units: int
) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    boost = output[0].numel() ** 0.5  # keeps gradients near 1, within the range of half precision
    for direction in directions:
        for decision, squares in taps.squared_products(
            output, (direction * boost).to(output.dtype), n_samples=n_units
        ).items():
            mean = squares.cpu() / (output[0].numel() * len(directions))
            total[decision] = total[decision] + mean if decision in total else mean
    return total


def price_of_pass(space: SearchSpace, timing: CallTiming) -> Price:
    """Going through the trajectory of a plan, as often as memory demands; formats are fitted already."""
    return price_of_passes(space, timing, CALL_FACTOR)


def _price(lab: Lab, _task: Task[NoKnobs]) -> Price:
    return price_of_pass(lab.space, lab.time_calls(lab.seeds.search)) + Price(seconds_of_fits(lab))


def _measure(lab: Lab, task: Task[NoKnobs]) -> Finding:
    probe = probe_jacobian(lab, plan_of(lab, task))
    return Finding(lab.bank, jacobian_table(lab.bank.space, lab.bank.candidates, probe)).with_evidence(probe)


JACOBIAN = Method(
    name=NAME,
    words=Words(
        summary="noise of the denoiser's output at each step, to first order",
        cost="the noise that its rounding puts on the denoiser's output, to first order",
        sees="all decisions and formats from one trajectory",
        misses="what errors of one step do at later ones, and what errors of layers do together",
    ),
    traits=Traits(is_prior=True),
    price=_price,
    price_of_prior=price_of_pass,
    measure=_measure,
)
