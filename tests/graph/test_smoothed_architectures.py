"""Smoothing changes no function: denoisers of many architectures, all their layers smoothed."""

from __future__ import annotations

import pytest
import torch
from denoisers import TINY, build

from folding_examples import close, plan_for, smoothed
from sedimo.graph.layers import weight_layers
from sedimo.graph.program import export_denoiser
from tolerances import FLOAT32_FORMULA


@pytest.mark.parametrize("name", TINY)
def test_the_float_function_is_unchanged(name):
    if name == "Hunyuan":
        pytest.skip("needs inputs that fit together; its folding is tested beside its graph")
    torch.manual_seed(0)
    denoiser = build(*TINY[name], device="cpu")
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    _, inputs = export_denoiser(denoiser)
    generator = torch.Generator().manual_seed(2)
    inputs = {n: _real(v, generator) for n, v in inputs.items()} | {"return_dict": False}
    _, plan = plan_for(denoiser, weight_layers(denoiser))
    with torch.no_grad():
        plain = denoiser(**inputs)[0]
        with smoothed(denoiser, plan):
            found = denoiser(**inputs)[0]
        after = denoiser(**inputs)[0]
    assert torch.equal(after, plain)
    assert close(found, plain, FLOAT32_FORMULA)
    if not plan.parameters or not any(p.constants for p in plan.parameters.values()):
        assert torch.equal(found, plain)  # powers of two are never rounded


def _real(value, generator):
    if isinstance(value, torch.Tensor):
        real = torch.randn(value.shape, generator=generator)
        return real if value.dtype.is_floating_point else torch.ones(value.shape, dtype=value.dtype)
    if isinstance(value, dict):
        return {k: _real(v, generator) for k, v in value.items()}
    return type(value)(_real(v, generator) for v in value) if isinstance(value, list | tuple) else value
