"""Oracles of differentiable runs: plain autograd through a whole pipeline, all of whose calls are in memory at once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sedimo.pipelines.differentiable import CutCall, DifferentiableRun, Tensors, make_again, pull_through
from sedimo.pipelines.sampling import final_latents


@contextmanager
def wanting_gradients(network: nn.Module) -> Iterator[None]:
    before = [p.requires_grad for p in network.parameters()]
    network.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, wanted in zip(network.parameters(), before, strict=True):
            parameter.requires_grad_(wanted)


@contextmanager
def whole_run(adapter, sampling) -> Iterator[torch.Tensor]:
    """Final latents `[n, ...]` that remember everything, for parameters of the denoiser that want gradients."""
    pipeline = adapter.pipeline
    call = functools.partial(inspect.unwrap(type(pipeline).__call__), pipeline)
    with wanting_gradients(adapter.denoiser), torch.enable_grad():
        yield final_latents(pipeline, sampling, call, cuts_last=True)[: len(sampling.seeds)]


def whole_gradient(adapter, sampling, direction: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of <direction, final latents> with respect to each parameter of the denoiser."""
    with whole_run(adapter, sampling) as latents:
        names, parameters = zip(*adapter.denoiser.named_parameters(), strict=True)
        found = torch.autograd.grad(latents, parameters, direction, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def walked_gradient(
    denoiser: nn.Module, run: DifferentiableRun, directions: Sequence[torch.Tensor]
) -> list[Mapping[str, torch.Tensor]]:
    """The same for each direction, from a run whose calls are made again one by one."""
    names, parameters = zip(*denoiser.named_parameters(), strict=True)
    sums = [{n: torch.zeros_like(p) for n, p in zip(names, parameters, strict=True)} for _ in directions]

    def handle(cut: CutCall, gradients: Sequence[Tensors]) -> Sequence[Tensors]:
        if cut.network is not denoiser:
            return pull_through(cut, gradients)
        outputs, entries = make_again(cut, cut.call.inputs)
        answers = []
        for total, one in zip(sums, gradients, strict=True):
            pairs = [(o, g) for o, g in zip(outputs, one, strict=True) if g is not None]
            if not pairs:
                answers.append([None] * len(entries))
                continue
            roots, given = zip(*pairs, strict=True)
            wanted = [*parameters, *entries]
            found = torch.autograd.grad(roots, wanted, given, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, found, strict=False):
                total[name] += 0 if gradient is None else gradient
            answers.append(list(found[len(names) :]))
        return answers

    with wanting_gradients(denoiser):
        run.walk_back(directions, handle)
    return sums
