"""Fields of settings say what they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import pytest

from sedimo.errors import InputError
from sedimo.settings import REQUIRED, Checked, block, one_of, option, within

TRIALS = within(least=1)


@dataclass(frozen=True, slots=True)
class Inner(Checked):
    n_seeds: int = option(8, "--seeds", least=2, most=64, help="Samples.")


@dataclass(frozen=True, slots=True)
class Outer(Checked):
    trials: int = option(REQUIRED, "--trials", check=TRIALS, help="Trials.")
    sampler: str = option("", "--sampler", check=one_of(("paper", "stratified")), help="Which.")
    low_bits: float | None = option(None, "--low-bits", check=within(hint="or nothing"), help="Least.")
    extent: Literal["all", "output"] = option("all", "--extent", help="What.")
    share: float = 0.1
    inner: Inner = block(Inner())

    def check_together(self) -> None:
        within(above=0, most=1)(self.share, "share")
        if self.trials == 7 and self.sampler == "paper":
            raise InputError("not seven papers")


REFUSED = {
    "below": ({"trials": 0}, "trials must be at least 1, got 0"),
    "another choice": ({"sampler": "dice"}, "sampler must be one of paper, stratified, got 'dice'"),
    "another literal": ({"extent": "none"}, "extent must be one of all, output, got 'none'"),
    "not a number": ({"low_bits": math.nan}, "low_bits must be a finite number (or nothing), got nan"),
    "infinite": ({"low_bits": -math.inf}, "low_bits must be a finite number (or nothing), got -inf"),
    "at an open end": ({"share": 0.0}, "share must be above 0 and at most 1, got 0.0"),
    "above": ({"share": 1.5}, "share must be above 0 and at most 1, got 1.5"),
    "together": ({"trials": 7, "sampler": "paper"}, "not seven papers"),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_a_value_that_a_field_refuses_is_an_error_with_rule_and_value(values, message):
    with pytest.raises(InputError) as raised:
        replace(Outer(trials=1), **values)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("n_seeds", "message"),
    [(1, "seeds must be at least 2 and at most 64, got 1"), (65, "seeds must be at least 2 and at most 64, got 65")],
)
def test_limits_of_an_option_hold_in_python_too(n_seeds, message):
    with pytest.raises(InputError, match=message):
        Inner(n_seeds)


def test_defaults_and_none_are_not_checked():
    assert Outer(trials=10**400).sampler == ""
