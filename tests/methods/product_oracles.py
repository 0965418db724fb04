"""Oracles of first-order effects: plain autograd through everything, one sample and direction after the other.

Nothing is cut, no gradient is formed layer by layer, and no row is told from another: a sample's gradient is that of
its own latents alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sedimo.codec import content_key
from sedimo.pipelines.trajectory import output_tensor
from whole_gradients import wanting_gradients, whole_run


@dataclass(frozen=True)
class Product:
    """<G, change>, and the product of the norms: the greatest that it could be."""

    value: float
    greatest: float


Products = dict[tuple[str, str], list[Product]]


def normal(words: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The numbers that a study's records were made with: their words are part of its format."""
    generator = torch.Generator().manual_seed(int(content_key(words)[:12], 16))
    return torch.randn(shape, generator=generator)


def weight_changes(bank) -> dict[tuple[str, str], torch.Tensor]:
    """What each weight format changes, by decision and name; of a stream its part alone."""
    return {
        (decision.name, str(f)): delta.double()
        for decision in bank.space.decisions
        for f, delta in bank.changes(decision.name)
    }


def weight_gradients(denoiser, bank, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a number with respect to the weight of each decision; tied weights are added."""
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    by_id = {id(p): torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)}
    gradients = {}
    for decision in bank.space.decisions:
        own = {id(p): by_id[id(p)] for p in (denoiser.get_parameter(f"{n}.weight") for n in decision.layers)}
        total = sum(own.values())
        stream = decision.stream
        gradients[decision.name] = (total if stream is None else total[:, stream.start : stream.stop]).double()
    return gradients


@contextmanager
def roundings_wanting_gradients(denoiser, bank) -> Iterator[Mapping[tuple[str, str], torch.Tensor]]:
    """For each decision and width of activations a zero; what it is multiplied with is what rounding would add."""
    zeros, handles = {}, []

    def add(module, args, output, quantizers, layer, zero):
        inputs = args[0].detach()
        rounded = quantizers.round(layer, inputs, n_axes=module.weight.ndim - 1, timestep=0.0)
        change, weight = rounded - inputs, module.weight.detach()
        if isinstance(module, torch.nn.Linear):
            return output + zero * F.linear(change, weight)
        return output + zero * module._conv_forward(change, weight, None)

    for decision in bank.space.decisions:
        for bits in decision.activation_bits:
            zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
            zeros[decision.name, f"a{bits}"] = zero
            for layer in decision.layers:
                quantizers = bank.activations.quantizers({layer: bits})

                def hook(module, args, output, found=(quantizers, layer, zero)):
                    return add(module, args, output, *found).to(output.dtype)

                handles.append(denoiser.get_submodule(layer).register_forward_hook(hook))
    try:
        yield zeros
    finally:
        for handle in handles:
            handle.remove()


def whole_products(adapter, bank, sampling, n_directions: int, seed: int = 0) -> Products:
    """Signed effects on the final latents, samples first: a sample's directions follow one another."""
    denoiser, changes, found = adapter.denoiser, weight_changes(bank), {}
    with roundings_wanting_gradients(denoiser, bank) as zeros, whole_run(adapter, sampling) as latents:
        for sample, sample_seed in zip(latents, sampling.seeds, strict=True):
            for number in range(n_directions):
                u = normal(f"sedimo adjoint {seed} {sample_seed} {number}", sample.shape)
                value = (u * sample).sum() / sample.detach().norm()
                gradients = weight_gradients(denoiser, bank, value)
                for (decision, name), change in changes.items():
                    gradient = gradients[decision]
                    product = Product(float((gradient * change).sum()), float(gradient.norm() * change.norm()))
                    found.setdefault((decision, name), []).append(product)
                for key, zero in zeros.items():
                    (slope,) = torch.autograd.grad(value, zero, retain_graph=True, allow_unused=True)
                    slope = 0.0 if slope is None else float(slope)
                    found.setdefault(key, []).append(Product(slope, abs(slope)))
    return found


def step_products(denoiser, bank, call, index: int, row_weights: tuple[float, ...], n_directions: int):
    """Signed effects on one recorded call's prediction, `[directions, units]` by decision and name.

    The units are samples whose rows are combined by the weights given, or rows.
    """
    n_units, changes = call.output.shape[0] // len(row_weights), weight_changes(bank)
    weights = torch.tensor(row_weights)
    found = {key: torch.zeros(n_directions, n_units, dtype=torch.float64) for key in changes}
    with wanting_gradients(denoiser), torch.enable_grad():
        rows = output_tensor(denoiser(**call.inputs)).unflatten(0, (len(row_weights), n_units))
        prediction = torch.einsum("k,ku...->u...", weights, rows)
        for number in range(n_directions):
            u = normal(f"sedimo direction 0 {index} {number}", tuple(prediction.shape))
            for unit in range(n_units):
                value = (u[unit] * prediction[unit]).sum() / prediction[unit].detach().norm()
                gradients = weight_gradients(denoiser, bank, value)
                for key, change in changes.items():
                    found[key][number, unit] = (gradients[key[0]] * change).sum()
    return found
