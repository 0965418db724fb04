"""The first-order noise that each format of each decision puts on the denoiser's output, ||J dW||^2.

For sample s, step t and a random u ~ N(0, I) on the output, let G be the gradient of <u, output> with respect to
a weight, for that sample alone. The mean over u of <G, dW>^2 is exactly ||J dW||^2, so the squared inner products
are averaged over steps and a few u. All decisions and formats come from one recorded trajectory.

Where guidance computes a sample in several rows, u is put on the prediction that the scheduler makes of them, if the
trajectory shows how (see `find_row_weights`). Else, and without `combine_rows`, each row counts as a sample of its own,
relative to the power of its own output, and a sample's value is the mean over its rows.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sedimo.allocation.table import SensitivityTable, build_table, mean_cost
from sedimo.bank import Candidate
from sedimo.lab.lab import Lab, seconds_of_fits
from sedimo.methods.method import N_RANDOM, Finding, Method, NoKnobs, Price, Task, Words, plan_of, price_of_passes
from sedimo.methods.taps import ChangedDecisions, FirstOrder, Numbers, Taps, drawn, each_part, kept, over
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import Trajectory, batches_of, output_tensor, rows_for, rows_of
from sedimo.space import SearchSpace

logger = logging.getLogger(__name__)

CALL_FACTOR = 12.0  # a call with gradients and inner products in all directions, in plain calls
NAME = "jacobian"
JACOBIAN_VERSION = 1
_DIGITS = 8
_MAX_RESIDUAL = 1e-2  # relative, of the next latents' change: half precision leaves about 1e-3
_MAX_SPREAD = 2e-2  # of the weights between steps
_TINY = 1e-30
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class JacobianPart:
    """Of one recorded call: relative noise of its samples by decision and format text; `unused` decisions."""

    noise: Numbers
    unused: tuple[str, ...]


def probe_jacobian(lab: Lab, on: Sampling, *, n_directions: int = 4, combine_rows: bool = True) -> FirstOrder:
    """Relative noise power of each sample, averaged over steps and random directions, of all formats of the lab's bank.

    `combine_rows` looks at guided rows as the sampler does, together; else each counts for itself. With a study, each
    call's part is saved when it is finished and not measured again.
    """
    setting = lab.setting(on, "step")
    trajectory = lab.parts().trajectory(on, setting)
    weights = (find_row_weights(trajectory) if combine_rows else None) or (1.0,)
    calls = list(enumerate(batches_of(on, trajectory.calls)))
    named = {"jacobian": JACOBIAN_VERSION, "setting": setting, "n_directions": n_directions, "seed": 0}
    named |= {} if weights == (1.0,) else {"row_weights": [f"{w:.3f}" for w in weights]}

    def measure(decisions: ChangedDecisions, indexed: tuple[int, tuple[DenoiserCall, range]]) -> JacobianPart:
        index, (call, samples) = indexed
        directions = _directions(call, weights, [f"sedimo direction 0 {index} {n}" for n in range(n_directions)])
        squares, unused = decisions.tapped(lambda taps: _mean_squares(taps, decisions, call, weights, directions))
        decisions.refuse_hidden_use(call, unused)
        noise = {}
        for decision, formats in decisions.names.items():
            found = squares.get(
                decision, torch.zeros(len(call.output) // len(weights), len(formats), dtype=torch.float64)
            )
            means = found.reshape(-1, len(samples), len(formats)).mean(0).T
            noise[decision] = kept(formats, means.tolist(), _DIGITS)
        return JacobianPart(noise, unused)

    parts = each_part(lab, JacobianPart, "first-order noise", calls, named, measure)
    sums: dict[str, dict[str, Matrix]] = {}
    used: set[str] = set()
    for part, (_, (_, samples)) in zip(parts, itertools.cycle(calls), strict=False):
        for decision, formats in part.noise.items():
            total = sums.setdefault(decision, {text: np.zeros(len(on.seeds)) for text in formats})
            for text, values in formats.items():
                total[text][samples.start : samples.stop] += values
        used |= part.noise.keys() - set(part.unused)
    counts = sum(np.isin(np.arange(len(on.seeds)), samples) for _, (_, samples) in calls)
    noise = {d: {text: tuple((one / counts).tolist()) for text, one in formats.items()} for d, formats in sums.items()}
    return FirstOrder(setting, n_directions, noise, tuple(sorted(sums.keys() - used)), weights)


def jacobian_table(space: SearchSpace, candidates: Iterable[Candidate], probe: FirstOrder) -> SensitivityTable:
    """Cost = mean over samples of the noise relative to the output's power, averaged over steps and directions.

    Rounded activations add their own noise to that of the weight: the two errors are independent to first order.
    The standard error comes from the variation between samples.
    """
    settings = probe.described(row_weights=", ".join(f"{w:.2f}" for w in probe.row_weights))
    return build_table(
        NAME,
        space,
        candidates,
        lambda c: mean_cost(probe.total(c.decision, c.format.changes).ravel()),
        settings,
        sees_activations=True,
    )


def _directions(call: DenoiserCall, weights: Sequence[float], names: Sequence[str]) -> list[torch.Tensor]:
    """Random u on the predictions of the call's units, divided by their norms and spread over the rows, `[R, ...]`.

    Units are samples, or rows when they stay apart.
    """
    rows = call.output.float().reshape(len(weights), -1, *call.output.shape[1:])
    prediction = torch.einsum("k,ku...->u...", torch.tensor(weights, device=rows.device), rows)
    norms, found = prediction.flatten(1).norm(dim=1), []
    of = f"the output at timestep {call.timestep:g}"
    for name in names:
        direction = over(drawn(name, prediction.shape), norms, of=of, remedy="look at it: error, or sqnr")
        found.append(torch.cat([weight * direction for weight in weights]))
    return found


def _mean_squares(
    taps: Taps,
    decisions: ChangedDecisions,
    call: DenoiserCall,
    weights: Sequence[float],
    directions: Sequence[torch.Tensor],
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Mean over directions of the squared inner products, `[units, F]` by decision; decisions not called."""
    device, n_sets, found = call.output.device, len(weights), dict[str, list[torch.Tensor]]()
    n_units = len(call.output) // n_sets
    for units in torch.split(torch.arange(n_units, device=device), max(1, decisions.max_rows // n_sets)):
        own = rows_for(units, n_units, n_sets)
        taps.begin(device, call.timestep)
        with torch.enable_grad():
            output = output_tensor(decisions.denoiser(**rows_of(call, own)))
        size, total = output[0].numel(), dict[str, torch.Tensor]()
        for direction in directions:  # boosted: keeps gradients near 1, within the range of half precision
            boosted = (direction[own] * size**0.5).to(output.dtype)
            products, _ = taps.products([output], [boosted], n_samples=len(units))
            for decision, one in products.items():  # samples that mix get the mean each
                squares = (one.square() * len(one) / len(units)).expand(len(units), -1)
                total[decision] = total.get(decision, 0.0) + squares.cpu() / (size * len(directions))
        for decision, squares in total.items():
            found.setdefault(decision, []).append(squares)
    return {d: torch.cat(slices) for d, slices in found.items()}, taps.unused


def find_row_weights(trajectory: Trajectory) -> tuple[float, ...] | None:
    """The weights of a sample's rows in its prediction, summing to 1, from what a sampler did; `(1.0,)` for one row.

    With classifier-free guidance the denoiser computes every sample twice (or more often), and the scheduler sees a
    weighted sum, y = a_0 y_0 + a_1 y_1. Errors that both rows have in common pass with weight 1, all others are
    amplified. Where the next latents are a linear function of the latents and the outputs, least squares give the
    weights, whatever the order of the rows and the guidance scale.

    None when the steps do not show them: a scheduler that adds noise, clips, changes the guidance, or whose step
    depends on more than the last two outputs.
    """
    calls = list(batches_of(trajectory.sampling, trajectory.calls))
    n_rows = {call.output.shape[0] // len(samples) for call, samples in calls}
    if n_rows == {1}:
        return (1.0,)
    if len(n_rows) != 1:
        return None
    steps = [_weights_of_step(calls[max(0, i - 1) : i + 2]) for i in range(len(calls) - 1)]
    found = [weights for weights in steps if weights is not None]
    if not found or 2 * len(found) < len(steps):
        return None
    weights = np.median(found, axis=0)
    spread = float(np.abs(np.asarray(found) - weights).max() / np.abs(weights).max())
    if spread > _MAX_SPREAD:
        logger.info("the weights of guided rows differ between steps by %.3f; rows count as samples", spread)
        return None
    return tuple(float(w) for w in weights / weights.sum())


def _weights_of_step(calls: Sequence[tuple[DenoiserCall, range]]) -> Matrix | None:
    """Weights of the last call but one, from how it led to the last; None where that does not show.

    The call before it is needed only when the step is no function of the present outputs alone.
    """
    (now, samples), (after, _) = calls[-2:]
    n, latents, next_latents = len(samples), _latents(now), _latents(after)
    if after.step != now.step + 1 or latents is None or next_latents is None:
        return None  # another batch begins
    channels = latents.shape[1]
    start, end = _rows(latents, n)[0], _rows(next_latents, n)[0]
    basis = [*_rows(now.output[:, :channels], n), start]
    n_rows = len(basis) - 1
    weights = _fit(basis, end, n_rows)
    before = calls[0][0]
    if weights is None and len(calls) == 3 and before.step == now.step - 1:
        weights = _fit([*basis, *_rows(before.output[:, :channels], n)], end, n_rows)
    return weights


def _fit(basis: Sequence[Matrix], end: Matrix, n_rows: int) -> Matrix | None:
    """Coefficients of the first `n_rows` vectors, divided by their sum; None when the fit or the sum is poor."""
    matrix = np.stack(basis, axis=1)
    if not (np.isfinite(matrix).all() and np.isfinite(end).all()):
        return None  # a sample diverged
    coefficients, *_ = np.linalg.lstsq(matrix, end, rcond=None)
    change = max(float(np.linalg.norm(end - basis[n_rows])), _TINY)
    weights = np.asarray(coefficients[:n_rows], dtype=np.float64)
    total = float(weights.sum())
    if (
        np.linalg.norm(matrix @ coefficients - end) > _MAX_RESIDUAL * change
        or abs(total) < 1e-3 * np.abs(weights).max()
    ):
        return None
    return weights / total


def _latents(call: DenoiserCall) -> torch.Tensor | None:
    """The channels that inputs and outputs have in common, of the input that has the output's batch and size."""
    output = call.output
    for value in call.inputs.values():
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value[:, :1].shape == output[:, :1].shape:
            return value[:, : output.shape[1]]
    return None


def _rows(tensor: torch.Tensor, n_samples: int) -> list[Matrix]:
    """Row j of every sample, flat, for each j."""
    flat = tensor.detach().double().cpu().reshape(-1, n_samples * tensor[0].numel())
    return list(flat.numpy())


_price_of_pass = functools.partial(price_of_passes, call_factor=CALL_FACTOR)  # formats are fitted already


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
    is_noise=True,
    n_random=N_RANDOM,
    price=lambda lab, _: _price_of_pass(lab.space, lab.time_calls(lab.seeds.search)) + Price(seconds_of_fits(lab)),
    price_of_prior=_price_of_pass,
    measure=_measure,
)
