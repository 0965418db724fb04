"""Error feedback against its definition: after each column, the best that the columns still to come can do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sedimo.errors import InputError
from sedimo.quant.fitting import feedback, feedback_of, fit_parameters, with_codes
from sedimo.quant.formats import WIDE_FORMATS, Format
from sedimo.quant.parts import Fitted

QUANTIZED = tuple(f for f in WIDE_FORMATS if f.is_quantized)


def correlated_moments(n: int, seed: int, rank: int | None = None) -> torch.Tensor:
    """Second moments of inputs that have much in common, `[n, n]`."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rank or 2 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return mixed.T @ mixed / len(mixed)


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output_error(weight: torch.Tensor, coded: Fitted, moments: torch.Tensor) -> float:
    change = (coded.dequantize() - weight).double().reshape(len(weight), -1)
    return float(((change @ moments.double()) * change).sum())


def codes_by_definition(
    weight: torch.Tensor, one_column: Format, moments: torch.Tensor, damping: float
) -> torch.Tensor:
    """Columns in the order of their power; those still to come are set to the least-squares answer, from scratch."""
    parameters = fit_parameters(weight, [one_column])[one_column]
    rows = weight.double()
    damped = moments.double() + damping * moments.double().diagonal().mean() * torch.eye(len(moments))
    order = moments.double().diagonal().argsort(descending=True, stable=True).tolist()
    codes, missed = torch.zeros(weight.shape, dtype=torch.uint8), torch.zeros_like(rows)
    for position, column in enumerate(order):
        done = order[:position]
        rest = order[position:]
        answer = rows[:, rest]
        if done:  # minimise (w - w') H (w - w') over the rest, the errors of what is done given
            cross = damped[rest][:, done] @ missed[:, done].T
            answer = rows[:, rest] + torch.linalg.solve(damped[rest][:, rest], cross).T
        trial = weight.clone()
        trial[:, column] = answer[:, 0].float()
        codes[:, column] = with_codes(trial, parameters).codes[:, column]
        kept = replace(parameters, codes=codes).dequantize()
        missed[:, column] = rows[:, column] - kept[:, column].double()
    return codes


@pytest.mark.parametrize("name", ["uaq2", "uaq3", "uaq4g64", "kmc2", "kmc3", "kma4"])
def test_codes_are_those_of_the_definition(name: str) -> None:
    weight, moments, number_format = random_weight(33, 100), correlated_moments(100, 1), Format.parse(name)
    parameters = fit_parameters(weight, [number_format])[number_format]
    found = with_codes(weight, parameters, [feedback(moments, damping=0.01)]).codes
    wanted = codes_by_definition(weight, number_format, moments, 0.01)
    assert (found == wanted).double().mean() > 0.99  # float32 may decide a near tie otherwise, and what follows


@pytest.mark.parametrize("number_format", QUANTIZED, ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (17, 65), (5, 7, 3, 3), (16, 64)])
def test_without_correlation_codes_are_the_nearest(number_format: Format, shape: tuple[int, ...]) -> None:
    weight = random_weight(*shape)
    parameters = fit_parameters(weight, [number_format])[number_format]
    power = torch.rand(weight[0].numel()) + 0.1
    found = with_codes(weight, parameters, [feedback(torch.diag(power))])
    assert torch.equal(found.codes, with_codes(weight, parameters).codes)
    assert found.shape == shape


@pytest.mark.parametrize("number_format", QUANTIZED, ids=str)
def test_the_output_error_falls(number_format: Format) -> None:
    weight, moments = random_weight(24, 96), correlated_moments(96, 2, rank=48)
    parameters = fit_parameters(weight, [number_format])[number_format]
    nearest, found = with_codes(weight, parameters), with_codes(weight, parameters, [feedback(moments)])
    assert output_error(weight, found, moments) < 0.8 * output_error(weight, nearest, moments)


def test_inputs_of_few_kinds_leave_next_to_nothing() -> None:
    """Ten different inputs, as embedded timesteps are: 128 columns make up for one another."""
    weight, moments = random_weight(16, 128), correlated_moments(128, 3, rank=10)
    number_format = Format.parse("uaq4")
    parameters = fit_parameters(weight, [number_format])[number_format]
    nearest = output_error(weight, with_codes(weight, parameters), moments)
    found = output_error(weight, with_codes(weight, parameters, [feedback(moments)]), moments)
    assert found < 0.1 * nearest


def test_errors_stay_within_a_part() -> None:
    weight, moments, number_format = random_weight(8, 40), correlated_moments(40, 4), Format.parse("kmc3")
    parameters = fit_parameters(weight, [number_format])[number_format]
    both = feedback_of([moments[:24, :24], moments[24:, 24:]], 0, 40)
    found = with_codes(weight, parameters, both).codes
    first_alone = with_codes(weight, parameters, [both[0], feedback(torch.eye(16))]).codes
    assert torch.equal(found[:, :24], first_alone[:, :24])
    assert not torch.equal(found[:, 24:], first_alone[:, 24:])


@given(start=st.integers(0, 39), width=st.integers(1, 40), block=st.integers(1, 40))
def test_blocks_are_cut_to_the_columns(start: int, width: int, block: int) -> None:
    stop = min(start + width, 40)
    moments = correlated_moments(40, 5)
    blocks = [moments[i : i + block, i : i + block] for i in range(0, 40, block)]
    parts = feedback_of(blocks, start, stop)
    assert sum(len(part.order) for part in parts) == stop - start
    first = parts[0]
    end = start + len(first.order)
    assert torch.equal(first.asked, feedback(moments[start:end, start:end]).asked)


def test_inputs_that_are_never_used_change_nothing() -> None:
    weight, number_format = random_weight(4, 12), Format.parse("uaq3")
    parameters = fit_parameters(weight, [number_format])[number_format]
    silent = with_codes(weight, parameters, [feedback(torch.zeros(12, 12))])
    assert torch.equal(silent.codes, with_codes(weight, parameters).codes)


def test_singular_moments_have_a_feedback() -> None:
    moments = torch.ones(50, 50)
    found = feedback(moments, damping=0.0)
    assert torch.isfinite(found.asked).all()


@pytest.mark.parametrize(
    ("moments", "said"),
    [
        (torch.full((3, 3), torch.nan), "hold NaN or infinity"),
        (torch.ones(3, 4), r"are a square matrix, got \(3, 4\)"),
        (torch.ones(3), r"are a square matrix, got \(3,\)"),
        (torch.tensor([[1.0, 9.0], [9.0, 1.0]]), "far from positive semidefinite"),
    ],
)
def test_what_are_no_moments_is_refused(moments: torch.Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        feedback(moments)


def test_moments_of_another_layer_are_refused() -> None:
    weight, number_format = random_weight(4, 12), Format.parse("uaq3")
    parameters = fit_parameters(weight, [number_format])[number_format]
    with pytest.raises(InputError, match="has 12 columns, its moments are of 11"):
        with_codes(weight, parameters, [feedback(torch.eye(11))], layer_name="proj")
    with pytest.raises(InputError, match="its parameters were fitted for"):
        with_codes(weight[:, :6], parameters, [feedback(torch.eye(6))], layer_name="proj")
