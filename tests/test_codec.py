"""Canonical JSON: exact round trips, strict reading, errors that name the place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedimo.codec import content_key, from_json, parse_json, to_json
from sedimo.errors import StateError
from sedimo.quant.formats import Format

KMC4 = Format("kmc", 4)


@dataclass(frozen=True, slots=True)
class Inner:
    value: float
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    inner: tuple[Inner, ...]
    numbers: Mapping[str, int]
    note: str | None = None
    number_format: Format = KMC4


@dataclass(frozen=True, slots=True)
class Named:
    place: str
    make: str


records = st.builds(
    Outer,
    name=st.text(),
    inner=st.lists(st.builds(Inner, value=st.floats(), kind=st.sampled_from(["a", "b"])), max_size=3).map(tuple),
    numbers=st.dictionaries(st.text(), st.integers(-(2**53), 2**53), max_size=3),
    note=st.none() | st.text(),
    number_format=st.sampled_from([Format("uaq", 4, 64), Format("kma", 2, None, 8)]),
)


@given(records)
def test_a_record_survives_the_round_trip(record):
    text = to_json(record)
    again = from_json(Outer, text)
    assert to_json(again) == text
    assert content_key(again) == content_key(record)


def test_a_field_may_have_any_name():
    assert from_json(Named, to_json(Named("here", "now"))) == Named("here", "now")


def test_the_key_does_not_depend_on_the_order_of_a_mapping():
    one = Outer("x", (), {"a": 1, "b": 2})
    two = Outer("x", (), {"b": 2, "a": 1})
    assert content_key(one) == content_key(two)


def test_the_text_is_canonical():
    assert to_json(Outer("ä", (Inner(0.1),), {"z": 1, "a": 2})) == (
        '{"inner":[{"kind":"a","value":0.1}],"name":"ä","note":null,"number_format":"kmc4","numbers":{"a":2,"z":1}}'
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"name":"x","inner":[],"numbers":{}', "not valid JSON"),
        ('{"name":"x","name":"y","inner":[],"numbers":{}}', "same key twice"),
        ('{"name":"x","inner":[],"numbers":{},"extra":1}', r"unknown fields \['extra'\]"),
        ('{"name":"x","numbers":{}}', r"lacks the fields \['inner'\]"),
        ('{"name":1,"inner":[],"numbers":{}}', "study.name must be of type str"),
        ('{"name":"x","inner":[{"value":"1"}],"numbers":{}}', r"study.inner\[0\].value must be of type float"),
        ('{"name":"x","inner":[{"value":1,"kind":"c"}],"numbers":{}}', "must be one of"),
        ('{"name":"x","inner":[],"numbers":{"k":true}}', "study.numbers.k must be of type int"),
        ('{"name":"x","inner":[],"numbers":{},"number_format":"kmc1"}', "bits must lie in 2..8"),
        ("[1]", "must be an object"),
        ('{"name":"x","inner":[{"value":NaN}],"numbers":{}}', "NaN is not JSON"),
    ],
)
def test_a_wrong_text_is_refused_with_its_place(text, complaint):
    with pytest.raises((StateError, ValueError), match=complaint):
        from_json(Outer, text, place="study")


def test_deep_nesting_is_refused_not_fatal():
    with pytest.raises(StateError, match="not valid JSON"):
        parse_json("[" * 200_000)


def test_values_without_a_place_in_a_record_are_refused():
    with pytest.raises(TypeError, match="cannot hold a set"):
        to_json({"x": {1, 2}})
