"""What every treatment keeps to, the smallest one included, which is put into the tuple and needs nothing else."""

from __future__ import annotations

import json
import math

import pytest
import torch

from contracts.toys import TOY_TREATMENT, ToyKnobs
from sedimo import treatments
from sedimo.allocation.solve import allocate_given
from sedimo.errors import InputError
from sedimo.jobs.job import treatment_offers
from sedimo.jobs.settings import treated
from sedimo.lab.bench import Compute, SourceSettings
from sedimo.lab.lab import Lab
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import Study
from sedimo.methods.error import describe
from sedimo.quant.formats import Format
from sedimo.settings import leaves
from sedimo.treatments import TREATMENTS
from sedimo.treatments.error_feedback import FeedbackSettings
from sedimo.treatments.learned_rounding import RoundingSettings
from sedimo.treatments.smoothing import SmoothingKnobs
from sedimo.treatments.static_ranges import ActivationSettings

ALL = (*TREATMENTS, TOY_TREATMENT)
WANTED = {  # what makes each of them do something, quickly
    "smoothing": SmoothingKnobs(0.7, 1.0),
    "error_feedback": FeedbackSettings(),
    "activations": ActivationSettings("min-max", n_steps=1),
    "learned_rounding": RoundingSettings(True, 1),
    "toy": ToyKnobs(3.0),
}
FORMATS = "uaq4a8,fp16"


def parameters_of(denoiser):
    """Every parameter and buffer, as an object and as a copy."""
    named = [*denoiser.named_parameters(remove_duplicate=False), *denoiser.named_buffers(remove_duplicate=False)]
    return {name: (tensor, tensor.detach().clone()) for name, tensor in named}


def is_untouched(denoiser, before):
    """Whether a denoiser has the same parameters, bit by bit, and no hook."""
    after = parameters_of(denoiser)
    same = all(after[n][0] is p and torch.equal(after[n][1], kept) for n, (p, kept) in before.items())
    hooks = [h for m in denoiser.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    return same and after.keys() == before.keys() and not hooks


@pytest.fixture
def lab(tiny_pipeline_folder, tmp_path):
    """A lab that can do everything: a pipeline in files, stored and computing denoiser apart, and a study."""
    torch.set_num_threads(1)
    source = SourceSettings(str(tiny_pipeline_folder), compute=Compute("fp32", "cpu"))
    with Study(tmp_path / "study") as study:
        yield Lab(source, formats=FORMATS, study=study, sampling=SamplingSettings(n_seeds=2, n_steps=2))


@pytest.mark.parametrize("treatment", ALL, ids=lambda one: one.name)
class TreatmentContract:
    """Collected as `TestTreatments`; a treatment of another package is tested by a class with its own parameters."""

    def test_it_says_what_it_is(self, treatment):
        assert treatment.name.isidentifier()
        assert len(treatment.words.summary) > 10
        assert not treatment.words.summary.endswith(".")
        assert treatment.words.source

    def test_people_can_set_it(self, treatment):
        found = list(leaves(treatment.knobs))
        assert found
        others = {f for one in ALL if one is not treatment for leaf in leaves(one.knobs) for f in leaf.flags}
        for leaf in found:
            assert leaf.flags
            assert not others.intersection(leaf.flags)
            assert all(flag.startswith("--") for flag in leaf.flags)
            assert leaf.help.endswith(".")
        assert treatment.is_wanted(WANTED[treatment.name])
        treatment.knobs()  # what is set where people set something else

    def test_it_does_something_before_or_after_the_decision(self, treatment):
        assert treatment.apply or treatment.finish

    def test_what_it_excludes_is_there(self, treatment):
        assert set(treatment.excludes) <= {one.name for one in ALL} - {treatment.name}

    def test_its_price_is_told(self, treatment, lab):
        """Those of a plan with small batches are more than are made; they are never a small part of those."""
        price = treatment.price(lab, WANTED[treatment.name])
        assert 0 <= price.seconds < math.inf
        calls = []
        handle = lab.pipe.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
        done(treatment, lab)
        handle.remove()
        assert (price.n_calls > 0) == bool(calls)
        assert price.n_calls >= len(calls) / 2

    def test_where_the_pipeline_cannot_run_it_says_so_before_it_starts(self, treatment, tiny_pipeline_folder):
        source = SourceSettings(str(tiny_pipeline_folder / "transformer"), compute=Compute("fp32", "cpu"))
        bare, knobs = Lab(source, formats=FORMATS), WANTED[treatment.name]
        try:
            price = treatment.price(bare, knobs)
        except InputError as error:
            assert "denoiser without its pipeline" in str(error)  # noqa: PT017  # either is right
        else:
            assert price.n_calls == 0

    def test_the_untreated_lab_stays_bit_exactly_as_it_was(self, treatment, lab):
        """Whatever the treated lab did with the same pipeline in between."""
        pipe, stored = lab.pipe.denoiser, lab.stored
        before, before_stored, digest = parameters_of(pipe), parameters_of(stored), lab.weights.digest
        sample = lab.pipe.sample(lab.seeds.search)
        found = done(treatment, lab)
        assert is_untouched(pipe, before)
        if treatment.apply is None:
            return
        other = lab.treated(found)
        assert other.pipe.denoiser is pipe
        assert other.stored is stored
        assert is_untouched(pipe, before) == (not other.is_changed)
        recipe = other.estimated.space.uniform(Format.parse("uaq4a8"))
        (treated_trial,) = other.measure([recipe], other.seeds.search)
        assert is_untouched(lab.pipe.denoiser, before)
        assert is_untouched(lab.stored, before_stored)
        assert lab.weights.digest == digest == lab.estimated.digest
        assert torch.equal(lab.pipe.sample(lab.seeds.search), sample)
        (trial,) = lab.measure([recipe], lab.seeds.search)
        assert treated_trial.key != trial.key  # else a study would take one for the other
        assert treated_trial.powers.noise.tolist() != trial.powers.noise.tolist()

    def test_what_is_in_force_tells_people_and_scripts(self, treatment, lab):
        found = done(treatment, lab)
        assert str(found)
        assert "object at" not in str(found)
        assert "(" not in str(found).partition(" ")[0]  # no record as it is
        json.dumps(found.as_json())

    def test_what_it_finishes_is_the_recipe(self, treatment, lab):
        if treatment.finish is None:
            pytest.skip("before the decision")
        found, wanted = done(treatment, lab), lab.estimated.quantize(allocation_of(lab).recipe)
        assert found.weights.keys() == wanted.keys()
        for layer, weight in found.weights.items():
            assert (weight.format, weight.stored_bytes) == (wanted[layer].format, wanted[layer].stored_bytes)


class TestTreatments(TreatmentContract):
    """Of this package, and the toy."""


def allocation_of(lab):
    """One layer in the format that is not fp16, so that little is to be done."""
    formats = {d.name: Format.parse("uaq4a8" if d.name == "proj_out_2" else "fp16") for d in lab.space.decisions}
    return allocate_given(describe(lab.estimated).table, formats)


def done(treatment, lab):
    """What a treatment does on a lab, before the decision or after it."""
    knobs = WANTED[treatment.name]
    if treatment.apply is not None:
        return treatment.apply(lab, knobs)
    return treatment.finish(lab, knobs, lab.estimated, allocation_of(lab))


def test_every_treatment_keeps_the_contract():
    assert [one.name for one in ALL] == list(WANTED)


def test_a_treatment_in_the_tuple_is_offered_and_done(lab, monkeypatch):
    monkeypatch.setattr(treatments, "TREATMENTS", ALL)
    assert ToyKnobs in [one.knobs for one in treatment_offers()]
    found = treated(lab, {"toy": ToyKnobs(3.0)})
    assert found.rules == ("the last weight 3 times",)
    assert found.is_changed
    assert not lab.is_changed
