"""Several labs on one denoiser: each finds it, its weights and its bank as its own treatments leave them."""

from __future__ import annotations

import pytest
import torch

from contracts.toys import LargerWeight
from sedimo.bank import fit_bank
from sedimo.errors import InputError
from sedimo.lab.bench import InForce
from sedimo.lab.lab import Lab
from sedimo.lab.seeds import SamplingSettings
from sedimo.pipelines.adapter import Sampling
from toy_pipeline import ToyAdapter, ToyWeights, toy_space

CHANGED = "unused"  # the last Linear layer


class Untouched(InForce):
    pass


class Failing(InForce):
    def enter(self, denoiser, *, is_stored):
        raise InputError("not this one")


@pytest.fixture
def lab():
    adapter = ToyAdapter()
    return Lab(adapter, fit_bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser)))


def weight_of(lab):
    return lab.pipe.denoiser.get_submodule(CHANGED).weight


def test_what_was_entered_before_one_that_fails_comes_out(lab):
    before = weight_of(lab)
    kept = before.detach().clone()
    with pytest.raises(InputError, match="not this one"):
        _ = lab.treated(LargerWeight(2.0), Failing()).pipe
    assert weight_of(lab) is before
    assert torch.equal(before, kept)


def test_labs_take_turns(lab):
    plain = weight_of(lab).detach().clone()
    twice, thrice = lab.treated(LargerWeight(2.0)), lab.treated(LargerWeight(3.0))
    weights = [one.weights for one in (twice, thrice)]
    for _ in range(2):
        assert torch.equal(weight_of(twice), 2 * plain)
        assert torch.equal(weight_of(thrice.treated(Untouched())), 3 * plain)
        assert torch.equal(weight_of(lab), plain)
        assert [torch.equal(w.read(CHANGED), n * plain) for w, n in zip(weights, (2, 3), strict=True)] == [True, True]
    assert (lab.is_changed, twice.is_changed, lab.treated(Untouched()).is_changed) == (False, True, False)


def test_a_bank_that_is_given_serves_its_own_weights_and_decisions_alone(lab):
    given = lab.bank
    assert lab.estimated is lab.treated(Untouched()).bank is given
    other = lab.treated(LargerWeight(2.0)).estimated
    assert other.digest != given.digest
    assert torch.equal(other.weights.read(CHANGED), 2 * given.weights.read(CHANGED))
    space = toy_space(lab.pipe.denoiser, "kmc4,fp16")
    assert lab.decided_on(space).estimated.space.decision_index.keys() == space.decision_index.keys()
    assert {str(c.format) for c in lab.decided_on(space).estimated.candidates} == {"kmc4", "fp16"}


def test_other_seeds_leave_the_banks_as_they_are(lab):
    given, other = lab.bank, lab.sampled(SamplingSettings(n_seeds=32))
    assert (other.seeds.settings.n_seeds, lab.seeds.settings.n_seeds) == (32, 8)
    assert other.bank is given


def test_processes_that_cannot_measure_are_refused_before_they_start(lab):
    on = Sampling((0, 1), 2)
    with pytest.raises(InputError, match="n_processes must be at least 0, got -1"):
        lab.measure([], on, n_processes=-1)
    with pytest.raises(InputError, match="made in memory and has no folder"):
        lab.measure([], on, n_processes=2)
