"""How rows are combined, read off a trajectory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sedimo.methods.jacobian import find_row_weights
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import Trajectory
from tolerances import FLOAT32_NETWORK

N, STEPS = 3, 6
SAMPLING = Sampling(seeds=(0, 1, 2), n_steps=STEPS)


def made(weights, *, noise=0.0, order=1, scale=lambda _: 1.0, learned=0, change=0.0):
    """A trajectory of a linear sampler that combines rows with `weights`; options spoil or complicate it."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, calls, before = draw(N, 2, 4, 4), [], None
    for step in range(STEPS):
        rows = torch.cat([x] * len(weights)) * scale(step)
        output = torch.tanh(rows.repeat(1, 1 + learned, 1, 1)) + draw(len(rows), 2 * (1 + learned), 4, 4)
        calls.append(DenoiserCall(step, 1.0, {"other": draw(N, 2), "sample": rows, "t": torch.tensor(1.0)}, output))
        parts = output[:, :2].reshape(len(weights), N, 2, 4, 4)
        spoiled = [w + change * step * (-1) ** i for i, w in enumerate(weights)]
        prediction = sum(w * part for w, part in zip(spoiled, parts, strict=True))
        slope = prediction if before is None or order == 1 else 1.5 * prediction - 0.5 * before
        x, before = 0.95 * x - 0.1 * slope + noise * draw(*x.shape), prediction
    return Trajectory(SAMPLING, tuple(calls), x)


@pytest.mark.parametrize("weights", [(4.0, -3.0), (-6.5, 7.5), (1.0, 0.0), (0.2, 0.3, 0.5)])
@pytest.mark.parametrize("options", [{}, {"order": 2}, {"scale": lambda s: 1 / (1 + s)}, {"learned": 1}])
def test_weights_are_found_in_any_order(weights, options):
    assert find_row_weights(made(weights, **options)) == pytest.approx(weights, abs=FLOAT32_NETWORK)


@pytest.mark.parametrize("options", [{"noise": 0.1}, {"change": 0.2}])
def test_what_the_steps_do_not_show_is_not_guessed(options):
    assert find_row_weights(made((4.0, -3.0), **options)) is None


def test_one_row_per_sample_needs_no_search():
    assert find_row_weights(made((1.0,))) == (1.0,)


def test_too_few_steps_or_no_latents_show_nothing():
    whole = made((4.0, -3.0))
    assert find_row_weights(Trajectory(SAMPLING, whole.calls[:1], whole.latents)) is None
    hidden = [SimpleNamespace(step=c.step, inputs={"t": c.inputs["t"]}, output=c.output) for c in whole.calls]
    assert find_row_weights(Trajectory(SAMPLING, tuple(hidden), whole.latents)) is None
