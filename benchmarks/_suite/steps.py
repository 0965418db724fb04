"""What a decision does to single steps of a recorded run: plainly by autograd, and by exchanging the weight.

Sedimo's own probe takes inner products by hooks on layers; this asks autograd for whole weight gradients, one sample at
a time, in the same random directions. It is slow and short, and the two must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from sedimo.bank import Bank
from sedimo.codec import content_key
from sedimo.lab.exchange import probed
from sedimo.methods.jacobian import find_row_weights
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.trajectory import Trajectory, batches_of, output_tensor, record, rows_for, rows_of
from sedimo.quant.formats import Format

N_DIRECTIONS, SEED = 4, 0  # those of Sedimo's probe


@dataclass(frozen=True, eq=False)
class StepNoise:
    """Noise power of each decision on the predictions `[calls, units]`, and the predictions' own power.

    A unit is a sample where guided rows are combined as the sampler does, else a row.
    """

    noise: Mapping[str, np.ndarray]
    power: np.ndarray

    def relative(self, name: str) -> float:
        """Each step relative to its own output, then the mean."""
        return float((self.noise[name] / self.power).mean())

    def absolute(self, name: str) -> float:
        """All steps' noise relative to all steps' power."""
        return float(self.noise[name].mean() / self.power.mean())


class Steps:
    """A run at full precision, call by call."""

    def __init__(self, pipe: DiffusersPipeline, sampling: Sampling) -> None:
        self.pipe = pipe
        self.trajectory: Trajectory = record(pipe, sampling)
        self.weights = find_row_weights(self.trajectory) or (1.0,)

    def first_order(self, bank: Bank, choice: Mapping[str, Format]) -> StepNoise:
        """Mean over directions of <G, dW>^2 for each decision at its format."""
        deltas = {name: _delta(bank, name, f) for name, f in choice.items()}
        noise: dict[str, list[np.ndarray]] = {name: [] for name in choice}
        power = []
        for index, call in self._calls():
            predictions = self._combined(call.output.float())
            power.append(predictions.flatten(1).square().sum(1).double().numpy())
            squares = self._squares(bank, call, _directions(predictions, index), deltas)
            for name, values in squares.items():
                noise[name].append(values)
        return StepNoise({name: np.stack(values) for name, values in noise.items()}, np.stack(power))

    def finite(self, bank: Bank, choice: Mapping[str, Format]) -> StepNoise:
        """The predictions' change when a decision's weight is exchanged, at the recorded inputs."""
        noise: dict[str, list[np.ndarray]] = {name: [] for name in choice}
        power = [self._combined(c.output.float()).flatten(1).square().sum(1).double().numpy() for _, c in self._calls()]
        for name, number_format in choice.items():
            weights = bank.quantize(bank.space.recipe({name: number_format}))
            with probed(self.pipe.denoiser, weights), torch.no_grad():
                for _, call in self._calls():
                    output = output_tensor(self.pipe.denoiser(**rows_of(call, slice(None))))
                    change = self._combined(output.float() - call.output.float())
                    noise[name].append(change.flatten(1).square().sum(1).double().numpy())
        return StepNoise({name: np.stack(values) for name, values in noise.items()}, np.stack(power))

    def _calls(self) -> Iterator[tuple[int, DenoiserCall]]:
        pairs = batches_of(self.trajectory.sampling, self.trajectory.calls)
        return ((index, call) for index, (call, _) in enumerate(pairs))

    def _combined(self, rows: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor(self.weights)
        return torch.einsum("k,ku...->u...", weights, rows.reshape(len(weights), -1, *rows.shape[1:]))

    def _squares(
        self, bank: Bank, call: DenoiserCall, directions: list[torch.Tensor], deltas: Mapping[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        denoiser, space = self.pipe.denoiser, bank.space.decision_index
        layers = {name: list(space[name].layers) for name in deltas}
        held = {layer: denoiser.get_submodule(layer).weight for found in layers.values() for layer in found}
        distinct = list({id(w): w.requires_grad_(True) for w in held.values()}.values())
        place = {id(w): i for i, w in enumerate(distinct)}
        n_units = len(directions[0])
        found = {name: np.zeros(n_units) for name in deltas}
        for unit in range(n_units):
            rows = rows_for(torch.tensor([unit]), n_units, len(self.weights))
            with torch.enable_grad():
                prediction = self._combined(output_tensor(denoiser(**rows_of(call, rows))))
            for u in directions:
                gradients = torch.autograd.grad(
                    prediction, distinct, u[unit : unit + 1], retain_graph=True, allow_unused=True
                )
                for name, delta in deltas.items():
                    own = {place[id(held[layer])] for layer in layers[name]}
                    parts = [_part(gradients[i], space[name].stream) for i in own if gradients[i] is not None]
                    product = sum(float((part * delta).sum()) for part in parts)
                    found[name][unit] += product**2 / len(directions)
        for weight in distinct:
            weight.requires_grad_(False)
        return found


def _part(gradient: torch.Tensor, stream) -> torch.Tensor:
    return gradient if stream is None else gradient[:, stream.start : stream.stop]


def _delta(bank: Bank, name: str, number_format: Format) -> torch.Tensor:
    return next(change for f, change in bank.changes(name) if f == number_format)


def _directions(predictions: torch.Tensor, index: int) -> list[torch.Tensor]:
    found = []
    for number in range(N_DIRECTIONS):
        key = content_key(f"sedimo direction {SEED} {index} {number}")
        found.append(torch.randn(predictions.shape, generator=torch.Generator().manual_seed(int(key[:12], 16))))
    return found
