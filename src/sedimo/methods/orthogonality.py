"""How much the outputs of a denoiser's layers repeat each other, and how many bits those deserve that repeat least.

For layer i, X_i `[n, p_i]` holds its output for each of n samples, flattened, and K_i = X_i X_i^T their Gram matrix,
centred on both sides. ORM(i, j) = <K_i, K_j> / (|K_i| |K_j|), between 0 and 1 (linear CKA), at each timestep.

Outputs are never kept: Gram matrices are added up while the denoiser runs, in float64 and in slices, those of one
timestep at a time. Where not all samples may run at once, they run in pairs of parts, which gives the same matrices. At
most the plan's batch runs at once, and at most so many samples that three of the largest output take `MEMORY_BYTES`
(an output, what is made of it, and one more), but no fewer than two.

A layer's gamma at timestep t is the mean of its row of the matrix without the diagonal: how much its output repeats
those of other layers. Its importance is

    theta = sum over t of w_t exp(-beta gamma_t),    w_t proportional to exp(tau (1 - progress_t)),

divided by the largest, with progress from 0 (the first, noisiest step) to 1. The published objective to be maximised,
the sum of theta times bits, becomes a cost by counting the bits that a format lacks to 16. It is linear, so its optimum
gives most layers the fewest or the most bits that there are. The objective `noise`, ours, is the sum of theta times
relative weight error instead: every bit less then costs about four times what the last one did.

Sources:
    Ma et al. 2023, OMPQ (arXiv 2109.07865): the matrix, with the centring of its code, and exponential importance of
    the row sum, whose beta is ours divided by the number of other layers. MPQ-Diff (arXiv 2412.00144): matrices and
    exponential weights per timestep; tau is our name for what it does not give. The bits that a family wastes (below)
    are ours: the published programme knows one family.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from scipy.special import logsumexp
from torch import nn

from sedimo.allocation.budget import allocated
from sedimo.allocation.table import SensitivityTable, build_table
from sedimo.bank import Candidate
from sedimo.codec import content_key
from sedimo.errors import InputError
from sedimo.lab.exchange import hooked
from sedimo.lab.lab import Lab, seconds_of_estimates
from sedimo.lab.study import Setting
from sedimo.methods.method import Finding, Method, Price, Task, Words, plan_of, refuse_blind
from sedimo.metrics.estimate import to_digits
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import calls_by_step, joined_calls, rows_for, rows_of
from sedimo.quant.families.family import CostEstimate
from sedimo.quant.families.uaq import UAQ
from sedimo.quant.formats import FULL_BITS
from sedimo.settings import Checked, option, within
from sedimo.space import SearchSpace

NAME = "orthogonality"
ORTHOGONALITY_VERSION = 2
N_TIMESTEPS = 10
LEAST_SAMPLES = 32
MIN_SAMPLES = 4
MEMORY_BYTES = 512 << 20  # of outputs at a time
MAX_REPLICATES = 16
_SLICE_BYTES = 32 << 20  # of an output in float64 at a time
_CONSTANT = 1e-9  # share of a layer's power that varies between samples, below which it is rounding
_DIGITS = 5
MAX_WASTE = 0.99  # of a bit: a worse family is still better than one bit less
UNITS = {"bits": "missing bits, weighted by importance", "noise": "weight error, weighted by importance"}
Objective = Literal["bits", "noise"]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class OrthogonalityPart:
    """Of one timestep: the upper triangle of the matrix row by row, without its diagonal of ones.

    `replicates` are each layer's sum of its row without its diagonal, by leaving out one part of the samples after
    another. The entries of layers of which nothing is known are 0: `constant` ones gave the same for all samples,
    `unused` ones were not called, `unread` ones gave outputs no axis of which grows with the number of samples.
    """

    timestep: float
    upper: tuple[float, ...]
    replicates: tuple[tuple[float, ...], ...]
    constant: tuple[str, ...]
    unused: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def unknown(self) -> frozenset[str]:
        """Layers without entries."""
        return frozenset((*self.constant, *self.unused, *self.unread))


@dataclass(frozen=True, slots=True)
class OrthogonalityProbe:
    """Parts of the sampled timesteps, in the order of sampling, for `layers`."""

    setting: Setting
    layers: tuple[str, ...]
    parts: tuple[OrthogonalityPart, ...]

    @property
    def matrices(self) -> Matrix:
        """The matrices `[T, L, L]`, ones on their diagonals."""
        n = len(self.layers)
        found = np.zeros((len(self.parts), n, n))
        rows, columns = np.triu_indices(n, 1)
        for matrix, part in zip(found, self.parts, strict=True):
            matrix[rows, columns] = part.upper
            matrix += matrix.T + np.eye(n)
        return found

    @property
    def sums(self) -> Matrix:
        """How much each layer repeats the others: its row's sum without the diagonal, `[T, L]`."""
        found: Matrix = self.matrices.sum(axis=2) - 1.0
        return found

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Which layers' outputs differ between samples, `[T, L]`; one such layer alone has none to be compared with."""
        unknown = [part.unknown for part in self.parts]
        found = np.array([[name not in some for name in self.layers] for some in unknown], dtype=bool)
        found[found.sum(axis=1) < 2] = False
        return found

    def gamma(self, sums: Matrix) -> Matrix:
        """Mean correlation with the other layers that are known, `[T, L]`; not a number where it is not known."""
        known = self.known
        return np.where(known, sums / np.maximum(known.sum(axis=1, keepdims=True) - 1, 1), np.nan)

    def never_known(self) -> dict[str, tuple[str, ...]]:
        """Layers of which nothing is known at any timestep, by reason: `constant`, `unused` or `unread`."""
        known = self.known
        unknown = [name for i, name in enumerate(self.layers) if not known[:, i].any()]
        unused = tuple(name for name in unknown if all(name in part.unused for part in self.parts))
        unread = tuple(name for name in unknown if any(name in part.unread for part in self.parts))
        constant = tuple(name for name in unknown if name not in (*unused, *unread))
        return {"constant": constant, "unused": unused, "unread": unread}


@dataclass(frozen=True, slots=True)
class ImportanceOptions(Checked):
    """Knobs of the importance; `objective` is what theta multiplies.

    With `beta` 0 all layers are alike; a negative `tau` makes late timesteps count more.
    """

    beta: float = option(10.0, "--beta", check=within(least=0), help="orthogonality: how sharply repetition counts.")
    tau: float = option(0.0, "--tau", check=within(), help="orthogonality: how much more early steps count.")
    tail_mean: bool = option(
        False, "--tail-mean", help="orthogonality: importance is the mean from a layer to the last one, as published."
    )
    objective: Objective = option(
        "bits", "--importance-of", help="orthogonality: weigh missing bits, as published, or weight noise."
    )


DEFAULT_IMPORTANCE = ImportanceOptions()


def probe_orthogonality(
    lab: Lab, layers: Sequence[str], on: Sampling, *, n_timesteps: int = N_TIMESTEPS
) -> OrthogonalityProbe:
    """Measures the matrix of `layers` at some timesteps, uniform over one recorded trajectory; resumes in the study."""
    n = len(on.seeds)
    if n < MIN_SAMPLES or n_timesteps < 1:
        raise InputError(
            f"orthogonality is measured between samples and needs at least {MIN_SAMPLES} and a timestep, got {n} "
            f"samples and {n_timesteps} timesteps"
        )
    parts, setting = lab.parts(), lab.setting(on, "step", weights_digest=lab.weights.digest)
    calls = calls_by_step(on, parts.trajectory(on, setting, at_most=n_timesteps).calls)
    named = {"orthogonality": ORTHOGONALITY_VERSION, "setting": setting, "layers": tuple(layers)}
    works = (
        (
            content_key({**named, "call": batches[0][0].step}),
            lambda batches=batches: measure_part(lab.pipe.denoiser, layers, joined_calls(batches), n, on.batch_size),
        )
        for batches in calls
    )
    found = tuple(parts.each(OrthogonalityPart, "orthogonality of layers", len(calls), works))
    return OrthogonalityProbe(setting, tuple(layers), found)


def measure_part(
    denoiser: nn.Module, layers: Sequence[str], call: DenoiserCall, n_samples: int, batch_size: int = 64
) -> OrthogonalityPart:
    """The part of one recorded call, whose row r belongs to sample r mod `n_samples`; `batch_size` run at once."""
    n_sets = call.output.shape[0] // n_samples

    def run(samples: torch.Tensor, hook: Callable[..., None]) -> None:
        rows = rows_for(samples, n_samples, n_sets)
        with torch.no_grad(), hooked(denoiser, {name: functools.partial(hook, name) for name in layers}):
            denoiser(**rows_of(call, rows.to(call.output.device)))

    alone: dict[str, list[torch.Tensor]] = {}  # outputs for one sample, without their values
    run(torch.arange(1), lambda name, _module, _args, output: alone.setdefault(name, []).append(output.to("meta")))
    most_bytes = max((output.nbytes for outputs in alone.values() for output in outputs), default=0)
    grams = _Grams(n_samples, n_sets, {name: [output.shape for output in one] for name, one in alone.items()})
    for samples in sample_runs(n_samples, max(2, min(batch_size, MEMORY_BYTES // max(1, 3 * most_bytes)))):
        grams.begin(samples)
        run(samples, grams.add)
    for name, gram in grams.found.items():
        if not np.isfinite(gram).all():
            raise InputError(
                f"the output of layer {name!r} is not finite at timestep {call.timestep:g}, so it cannot be compared "
                "with others; compute in a wider dtype (--dtype fp32), or leave the layer out of the space"
            )
    read = {name: _centred(grams.found[name]) for name in layers if name in alone and name not in grams.unread}
    known = [read.get(name) for name in layers]
    return OrthogonalityPart(
        call.timestep,
        tuple(to_digits(v, _DIGITS) for v in orthogonality(known)[np.triu_indices(len(layers), 1)]),
        tuple(tuple(to_digits(v, _DIGITS) for v in sums) for sums in _replicates(known, n_samples)),
        constant=tuple(name for name, gram in read.items() if gram is None),
        unused=tuple(name for name in layers if name not in alone),
        unread=tuple(name for name in layers if name in grams.unread),
    )


def orthogonality(grams: Sequence[Matrix | None]) -> Matrix:
    """ORM `[L, L]` of centred Gram matrices `[n, n]`; rows and columns of None are 0, the diagonal is 1."""
    n = max((len(g) for g in grams if g is not None), default=1)
    flat = np.stack([np.zeros(n * n) if g is None else g.ravel() / np.linalg.norm(g) for g in grams])
    found: Matrix = np.clip(flat @ flat.T, 0.0, 1.0)
    np.fill_diagonal(found, 1.0)
    return found


class _Grams:
    """Adds up the Gram matrix of each layer's outputs, pair of samples by pair of samples.

    `alone` are the shapes of outputs for one sample: the axis that is as many times longer as there are samples holds
    them, `n_sets` times, one after the other, each with the rows into which a denoiser may have folded others.
    """

    def __init__(self, n_samples: int, n_sets: int, alone: Mapping[str, Sequence[torch.Size]]) -> None:
        self.found = {name: np.zeros((n_samples, n_samples)) for name in alone}
        self.unread: set[str] = set()
        self._n_sets, self._alone = n_sets, alone
        self._done = np.zeros((n_samples, n_samples), dtype=bool)

    def begin(self, samples: torch.Tensor) -> None:
        """Tells which samples the next run is of."""
        where = samples.numpy()
        self._place = np.ix_(where, where)
        self._wanted = ~self._done[self._place]
        self._done[self._place] = True
        self._calls = {name: iter(shapes) for name, shapes in self._alone.items()}

    def add(self, name: str, _module: nn.Module, _args: object, output: torch.Tensor) -> None:
        """The hook of a layer."""
        n_units, alone = len(self._wanted), next(self._calls.get(name, iter(())), torch.Size())
        if alone == output.shape:
            return  # the same for all samples
        axes = [axis for axis, pair in enumerate(zip(alone, output.shape, strict=False)) if len(set(pair)) > 1]
        if len(alone) != output.ndim or len(axes) != 1 or output.shape[axes[0]] != n_units * alone[axes[0]]:
            self.unread.add(name)
            return
        units = output.detach().movedim(axes[0], 0).reshape(self._n_sets, n_units, -1)
        total = sum(_gram(rows) for rows in units)
        self.found[name][self._place] += np.where(self._wanted, np.asarray(total), 0.0)


def _gram(rows: torch.Tensor) -> Matrix:
    """X X^T of `[n, p]` in float64, a slice of features at a time."""
    found = torch.zeros(rows.shape[0], rows.shape[0], dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, max(1, _SLICE_BYTES // (8 * rows.shape[0])), dim=1):
        values = part.double()
        found += values @ values.T
    plain: Matrix = found.cpu().numpy()
    return plain


def sample_runs(n_samples: int, at_once: int) -> Iterator[torch.Tensor]:
    """Samples of each run, such that every pair of samples meets in one."""
    if n_samples <= at_once:
        yield torch.arange(n_samples)
        return
    for one, other in itertools.combinations(torch.split(torch.arange(n_samples), at_once // 2), 2):
        yield torch.cat([one, other])


def _centred(gram: Matrix) -> Matrix | None:
    """H K H with H = I - 1/n, also of a part of a centred matrix; None where samples do not differ."""
    rows = gram - gram.mean(axis=0, keepdims=True)
    found: Matrix = rows - rows.mean(axis=1, keepdims=True)
    return None if np.trace(found) <= _CONSTANT * np.trace(gram) else found


def _replicates(grams: Sequence[Matrix | None], n_samples: int) -> Iterator[Matrix]:
    """Sums of the rows without some samples, `[L]` each; the samples left out are another part each time."""
    for left_out in np.array_split(np.arange(n_samples), min(n_samples, MAX_REPLICATES)):
        kept = np.setdiff1d(np.arange(n_samples), left_out)
        smaller = [None if g is None else _centred(g[np.ix_(kept, kept)]) for g in grams]
        yield orthogonality(smaller).sum(axis=1) - 1.0


def importance(
    probe: OrthogonalityProbe, options: ImportanceOptions = DEFAULT_IMPORTANCE, sums: Matrix | None = None
) -> Matrix:
    """The theta of each layer `[L]`, the largest 1: 0 if it was never called, the mean where nothing is known.

    Of other `sums` of rows, where they are given, such as those of a replicate. In logarithms up to the end, so that no
    beta and no tau leaves nothing of all layers.
    """
    known, gamma = probe.known, probe.gamma(probe.sums if sums is None else sums)
    is_known = known.any(axis=0)
    if not is_known.any():
        raise InputError("orthogonality compares layers, but at no timestep two of them differ between samples")
    weights = options.tau * (1.0 - np.linspace(0.0, 1.0, len(known)))
    shares = np.where(known, (weights - logsumexp(weights))[:, None], -np.inf)[:, is_known]
    each = -options.beta * np.nan_to_num(gamma)[:, is_known]
    logs = logsumexp(shares + each, axis=0) - logsumexp(shares, axis=0)
    theta = np.ones(known.shape[1])
    theta[is_known] = np.exp(logs - logs.max())
    theta[~is_known] = theta[is_known].mean()
    if options.tail_mean:
        theta = np.cumsum(theta[::-1])[::-1] / np.arange(len(theta), 0, -1)
    unused = probe.never_known()["unused"]
    found: Matrix = theta / theta.max() * [name not in unused for name in probe.layers]
    return found


def importance_error(probe: OrthogonalityProbe, options: ImportanceOptions) -> Matrix:
    """Jackknife errors of theta `[L]`."""
    replicates = np.array([part.replicates for part in probe.parts])  # [T, R, L]
    thetas = np.stack([importance(probe, options, one) for one in np.moveaxis(replicates, 1, 0)])
    n = len(thetas)
    found: Matrix = np.sqrt((n - 1) / n * ((thetas - thetas.mean(axis=0)) ** 2).sum(axis=0))
    return found


def importance_per_step(probe: OrthogonalityProbe, options: ImportanceOptions) -> Matrix:
    """exp(-beta gamma_t) `[T, L]`, the largest 1; not a number where nothing is known."""
    gamma = probe.gamma(probe.sums)
    found: Matrix = np.exp(-options.beta * (gamma - np.nanmin(gamma)))
    return found


def orthogonality_table(
    space: SearchSpace,
    candidates: Iterable[Candidate],
    probe: OrthogonalityProbe,
    options: ImportanceOptions = DEFAULT_IMPORTANCE,
) -> SensitivityTable:
    """Cost = theta times (16 - bits of the format + bits that its family wastes), or theta times weight error.

    Where activations are quantized, the bits that they lack to 16 count like those of the weights, theta times
    (32 - b_w - b_a): this is ours, because the published objective has weights alone. A stream of a layer has the
    layer's theta times its share of the layer's weights: a layer whose streams agree costs what it would cost whole.

    The bits that a family wastes against the best one of equal bits are half the binary logarithm of the ratio of
    their weight errors, at most almost one: so families differ, and of one family alone the costs are the published
    objective.
    """
    candidates, unknown = tuple(candidates), probe.never_known()
    theta, errors = importance(probe, options), importance_error(probe, options)
    place = {name: i for i, name in enumerate(probe.layers)}
    least: dict[tuple[str, int], float] = {}  # weight error of the families of equal bits, by decision and bits
    for c in (c for c in candidates if c.format.is_quantized):
        least[c.decision, c.format.bits] = min(least.get((c.decision, c.format.bits), math.inf), c.error)
    thetas: dict[str, tuple[float, ...]] = {}  # mean of a decision's layers that are used, and of their errors
    for d in space.decisions:
        probed = [layer for layer in d.layers if layer in place]
        if not probed:
            raise InputError(f"the probe has no layer of {d.name}; measure it again for this space")
        rows = [place[layer] for layer in probed if layer not in unknown["unused"]]
        thetas[d.name] = tuple(d.share * float(one[rows].mean()) if rows else 0.0 for one in (theta, errors))

    def estimate(candidate: Candidate) -> CostEstimate:
        value, error = thetas[candidate.decision]
        if options.objective == "noise":
            factor = candidate.error
        else:
            best = least.get((candidate.decision, candidate.format.bits), 0.0)
            factor = FULL_BITS - candidate.format.bits + _wasted(candidate.error, best)
            factor += FULL_BITS - candidate.format.activation_bits
        return CostEstimate(value * factor, error * factor, probe.setting.n_samples)

    settings = {
        "beta": f"{options.beta:g}",
        "tau": f"{options.tau:g}",
        "tail_mean": str(options.tail_mean),
        "objective": options.objective,
        "n_samples": str(probe.setting.n_samples),
        "n_timesteps": str(len(probe.parts)),
        **{f"{reason}_layers": ", ".join(names) or "none" for reason, names in unknown.items()},
    }
    unit, is_joint = UNITS[options.objective], options.objective == "bits"
    return build_table(NAME, space, candidates, estimate, settings, unit=unit, sees_activations=is_joint)


def _wasted(error: float, least: float) -> float:
    """Bits that a family wastes against the one of least weight error; against an exact one all that it may."""
    if error <= least:
        return 0.0
    return min(0.5 * math.log2(error / least), MAX_WASTE) if least > 0 else MAX_WASTE


def converged(probe: OrthogonalityProbe, options: ImportanceOptions = DEFAULT_IMPORTANCE) -> tuple[float, ...]:
    """Rank correlation of importances from 1, 2, ... timesteps with those from all.

    It is not a number where fewer timesteps, or all, rank nothing: no two layers differ between samples there, or all
    are alike.
    """
    everything, n, found = importance(probe, options), len(probe.parts), []
    for k in range(1, n + 1):
        chosen = sorted({round(i) for i in np.linspace(0, n - 1, k)}) if k > 1 else [n // 2]
        part = replace(probe, parts=tuple(probe.parts[i] for i in chosen))
        theta = importance(part, options) if part.known.any() else np.ones(len(everything))
        can_rank = np.ptp(theta) > 0 and np.ptp(everything) > 0
        found.append(float(stats.spearmanr(theta, everything).statistic) if can_rank else math.nan)
    return tuple(found)


def _price(lab: Lab, _task: Task[ImportanceOptions]) -> Price:
    """A trajectory of more samples, some of its calls again in pairs of halves of a batch, and errors estimated.

    Fewer samples run at once where outputs are large, which is known only when they are there.
    """
    timing, on = lab.time_calls(lab.seeds.search), lab.seeds.more(LEAST_SAMPLES)
    n_timesteps, n = min(N_TIMESTEPS, on.n_steps), len(on.seeds)
    runs = [len(samples) for samples in sample_runs(n, max(2, on.batch_size))]
    share = max(1.0, LEAST_SAMPLES / lab.seeds.settings.n_seeds)
    calls = round(share * timing.n_calls)
    again = n_timesteps * share * timing.n_calls / on.n_steps * sum(runs) / n
    seconds = (calls + again) * timing.seconds_per_call + seconds_of_estimates(lab)
    return Price(seconds, calls + n_timesteps * (1 + len(runs)), MEMORY_BYTES)


def _measure(lab: Lab, task: Task[ImportanceOptions]) -> Finding:
    bank = lab.estimated
    layers = [layer for weight in bank.space.weights for layer in weight.layers]
    probe = probe_orthogonality(lab, layers, plan_of(lab, task, LEAST_SAMPLES))
    table = orthogonality_table(bank.space, bank.candidates, probe, task.knobs)
    return Finding(bank, table).with_evidence(probe, task.knobs)


ORTHOGONALITY = Method(
    name=NAME,
    words=Words(
        summary="how little a layer's output repeats those of others, times the bits that a format lacks",
        source="MPQ-Diff (arXiv 2412.00144), OMPQ (arXiv 2109.07865)",
        cost="how little its output repeats that of other layers",
        sees="the outputs of whole layers between samples, at ten timesteps",
        misses="noise: a layer that goes nowhere may well repeat others least",
    ),
    knobs=ImportanceOptions,
    price=_price,
    measure=_measure,
    refuse=lambda task, formats: None if task.knobs.objective == "bits" else refuse_blind(NAME, formats),
)
ORTHOGONALITY_LP = replace(
    ORTHOGONALITY,
    name="orthogonality-lp",
    words=replace(ORTHOGONALITY.words, summary="orthogonality by the published linear programme with rounding"),
    family=UAQ.name,
    told_as=NAME,
    decide=lambda _lab, task, finding: replace(
        finding,
        allocation=allocated(finding.table, task.budget, rule="lp"),  # its one split decision rounded down
    ),
)
ORTHOGONALITY_NOISE = replace(
    ORTHOGONALITY,
    name="orthogonality-noise",
    words=replace(ORTHOGONALITY.words, summary="the importance of orthogonality, times weight error"),
    is_blind=True,
    told_as=NAME,
    measure=lambda lab, task: _measure(lab, replace(task, knobs=replace(task.knobs, objective="noise"))),
)
