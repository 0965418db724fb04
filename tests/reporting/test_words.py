"""As many digits as the error justifies."""

# ruff: noqa: RUF001  # the signs under test

from __future__ import annotations

import math

import pytest

from sedimo.metrics.estimate import Estimate
from sedimo.reporting.words import bits, byte_size, duration, interval, number, share, with_error

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (9.7349, 0.3, "9.7"),
        (9.7349, 0.29, "9.73"),
        (9.7349, 0.013, "9.735"),
        (1234.5, 40.0, "1230"),
        (9.7349, NAN, "9.73"),
        (9.7349, 0.0, "9.73"),
        (-0.52, 0.2, "−0.52"),
        (0.0, NAN, "0.000"),
        (3.2e-5, 1e-6, "3.20 × 10⁻⁵"),
        (7.4e6, NAN, "7.40 × 10⁶"),
        (INF, NAN, "∞"),
        (-INF, NAN, "−∞"),
        (NAN, 1.0, "not a number"),
        (5.0, INF, "5.00"),
    ],
)
def test_digits_follow_the_error(value, error, text):
    assert number(value, error) == text


def test_a_sign_is_shown_where_asked_for():
    assert number(0.92, 0.6, signed=True) == "+0.9"
    assert number(-0.01, 0.6, signed=True) == "0.0"


@pytest.mark.parametrize(
    ("estimate", "text", "limits"),
    [
        (Estimate(10.21, 0.29, 9.63, 10.79, 64), "10.21 ± 0.58", "9.63 to 10.79"),
        (Estimate(9.1e-4, 3.1e-4, 3e-4, 15.2e-4, 9), "(9 ± 6) × 10⁻⁴", "0.0003 to 0.0015"),
        (Estimate(9.1e-4, 3.1e-5, 8.4e-4, 9.8e-4, 9), "(9.1 ± 0.7) × 10⁻⁴", "(8.4 to 9.8) × 10⁻⁴"),
        (Estimate(4.0, NAN, -INF, INF, 1), "4.00", ""),
        (Estimate(INF, 0.0, INF, INF, 3), "∞", ""),
    ],
)
def test_value_and_interval_share_their_digits(estimate, text, limits):
    assert with_error(estimate) == text
    assert interval(estimate) == limits


def test_units_stick_to_the_number():
    estimate = Estimate(10.21, 0.29, 9.63, 10.79, 64)
    assert with_error(estimate, "dB") == "10.21 ± 0.58\N{NARROW NO-BREAK SPACE}dB"
    assert interval(estimate, "dB").endswith("\N{NARROW NO-BREAK SPACE}dB")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_600, "1.00 MB"), (4_266_000, "4.27 MB"), (-1500, "−1.50 kB")],
)
def test_bytes_have_three_digits(n_bytes, text):
    assert byte_size(n_bytes) == text.replace(" ", "\N{NARROW NO-BREAK SPACE}")


@pytest.mark.parametrize(
    ("value", "text"), [(0.4349, "43 %"), (0.00052, "0.052 %"), (0.0999, "10 %"), (0.0, "0.00 %"), (1e-7, "< 0.001 %")]
)
def test_shares(value, text):
    assert share(value).replace("\N{NARROW NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (37.4, "37 s"), (245, "4 min 05 s"), (7385, "2 h 03 min")]
)
def test_durations(seconds, text):
    assert duration(seconds).replace("\N{NARROW NO-BREAK SPACE}", " ") == text


def test_bits():
    assert (bits(3.5), bits(4.0), bits(3.456)) == ("3.50", "4", "3.46")
