"""Formats as values and their sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedimo.errors import InputError
from sedimo.quant.formats import (
    FP16,
    PAPER_FORMATS,
    WIDE_FORMATS,
    Format,
    paper_bytes,
    parse_formats,
    row_bytes,
    stored_bytes,
    with_activations,
)

widths = st.integers(2, 8) | st.just(16)
formats = st.one_of(
    st.builds(Format, st.sampled_from(["kmc", "kma"]), st.integers(2, 8), st.none(), widths),
    st.builds(Format, st.just("uaq"), st.integers(2, 8), st.none() | st.integers(2, 512), widths),
    st.builds(Format, st.just("fp"), st.just(16), st.none(), widths),
)
shapes = st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple)


@given(formats)
def test_text_names_exactly_one_format(number_format):
    assert Format.parse(str(number_format)) == number_format


@pytest.mark.parametrize("text", ["kmc1", "kmc9", "uaq", "kma4g64", "uaq4g1", "fp8", "kmc4a1", "kmc4a17", "", "KMC4"])
def test_what_is_no_format_is_refused(text):
    with pytest.raises(InputError, match=r"format|bits|group"):
        Format.parse(text)


def test_the_named_sets_are_those_of_the_design():
    assert [str(f) for f in PAPER_FORMATS] == ["uaq3", "uaq4", "kmc3", "kmc4", "kma3", "kma4"]
    assert len(WIDE_FORMATS) == 20
    assert WIDE_FORMATS[-1] == FP16
    assert parse_formats("wide") == WIDE_FORMATS
    assert parse_formats("kmc4, uaq4g64") == (Format("kmc", 4), Format("uaq", 4, 64))


@pytest.mark.parametrize("bad", ["", [], ["kmc4", "kmc4"]])
def test_an_empty_or_repeating_list_is_refused(bad):
    with pytest.raises(InputError):
        parse_formats(bad)


def test_paper_bytes_has_the_published_check_value():
    assert paper_bytes(FP16, (1152, 256)) == 589_824
    assert paper_bytes(Format("uaq", 3), (1152, 256)) == 115_200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uaq3", 10 * 4 + 10 * 6),  # 9 inputs x 3 bits = 27 bits = 4 bytes a row; float32 and int16 a row
        ("uaq3g4", 10 * 4 + 10 * 3 * 3),  # 3 groups a row; float16 and uint8 each
        ("kmc2", 10 * 3 + 10 * 4 * 2),
        ("kma2", 10 * 3 + 4 * 2),
        ("fp16", 180),
    ],
)
def test_stored_bytes_by_hand(text, expected):
    assert stored_bytes(Format.parse(text), (10, 9)) == expected
    assert stored_bytes(Format.parse(text), (10, 1, 3, 3)) == expected


@given(shapes, st.sampled_from(["uaq", "kmc", "kma"]), st.integers(2, 7))
def test_more_bits_never_cost_less(shape, family, bits):
    less, more = Format(family, bits), Format(family, bits + 1)
    assert paper_bytes(less, shape) <= paper_bytes(more, shape)
    assert stored_bytes(less, shape) <= stored_bytes(more, shape)


@given(st.integers(2, 8), st.integers(1, 10_000))
def test_a_row_wastes_less_than_a_byte(bits, n_inputs):
    assert 0 <= row_bytes(bits, n_inputs) * 8 - bits * n_inputs < 8


def test_each_format_with_each_width_of_activations():
    found = with_activations(parse_formats("uaq4g64,kmc3,fp16"), (4, 8, 16))
    assert [str(f) for f in found] == (
        ["uaq4g64a4", "uaq4g64a8", "uaq4g64", "kmc3a4", "kmc3a8", "kmc3", "fp16a4", "fp16a8", "fp16"]
    )
    assert with_activations(WIDE_FORMATS, [16]) == WIDE_FORMATS


@pytest.mark.parametrize(
    ("text", "widths", "message"),
    [
        ("uaq4", (), "one or more different numbers"),
        ("uaq4", (8, 8), "one or more different numbers"),
        ("uaq4a8", (4,), "has activation bits already"),
        ("uaq4", (1,), "activation bits must lie in"),
        ("uaq4", (12,), "activation bits must lie in"),
    ],
)
def test_widths_that_mean_nothing(text, widths, message):
    with pytest.raises(InputError, match=message):
        with_activations(parse_formats(text), widths)
