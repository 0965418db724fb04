"""Effects on the final latents against plain autograd through the whole pipeline, number by number."""

from __future__ import annotations

import os
import signal
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from product_oracles import whole_products

from sedimo.bank import fit_bank
from sedimo.errors import InputError, Interrupted, UnsupportedError
from sedimo.lab.exchange import passes, weight_changes
from sedimo.lab.lab import Lab
from sedimo.lab.study import Study
from sedimo.methods import adjoint, taps
from sedimo.methods.adjoint import probe_adjoint
from sedimo.pipelines.adapter import Sampling
from sedimo.quant.formats import Format
from tolerances import FLOAT32_FORMULA, FLOAT32_SUM
from toy_pipeline import ToyDenoiser, ToyWeights, toy_space
from toy_sampler import PixelToyPipeline, ToyPipeline, ToySampler, ToyScheduler

SAMPLING = Sampling(seeds=(1, 2, 3), n_steps=3, batch_size=3)
PRODUCT_TOLERANCE = 2e-6  # of the product of the norms: gradients are float64, but products are summed in float32
FORMATS = "uaq3,uaq4,kmc3,uaq4a8,uaq4a4,fp16a8,fp16"
SAMPLED = 0.6  # of means of 60 squared normals: they have 18 %
SAMPLED_MEAN = 0.3  # of the mean over samples of such


def made(denoiser=None, *, formats="uaq3,kmc4,fp16", dtype=torch.float64, pipeline=ToyPipeline, **settings):
    """A toy, whose weights are float32 numbers in any case, and its bank."""
    torch.manual_seed(3)
    denoiser = (denoiser or ToyDenoiser()).eval()
    bank = fit_bank(ToyWeights(denoiser), toy_space(denoiser, formats))
    return ToySampler(pipeline(denoiser.to(dtype), **{"guided": True, **settings})), bank


def assert_close(probe, wanted, tolerance=PRODUCT_TOLERANCE):
    assert {(d, name) for d, changes in probe.numbers.items() for name in changes} == wanted.keys()
    for (decision, name), products in wanted.items():
        got = probe.numbers[decision][name]
        assert len(got) == len(products)
        for value, product in zip(got, products, strict=True):
            near = pytest.approx(product.value, rel=FLOAT32_SUM, abs=tolerance * product.greatest)
            assert value == near, (decision, name)


def assert_same_numbers(one, other):
    """As measured in other pieces; values that cancelled are compared with their decision's others."""
    assert one.numbers.keys() == other.numbers.keys()
    for decision, changes in one.numbers.items():
        for name, values in changes.items():
            scale = max(map(abs, values))
            near = pytest.approx(values, rel=FLOAT32_FORMULA, abs=FLOAT32_FORMULA * scale)
            assert other.numbers[decision][name] == near, decision


@pytest.mark.parametrize("pipeline", [ToyPipeline, PixelToyPipeline])
@pytest.mark.parametrize("guided", [False, True])
def test_products_are_those_of_plain_autograd(pipeline, guided):
    """Convolutions with groups and odd padding, a tied pair, a layer that is called twice, rows that samples share."""
    adapter, bank = made(pipeline=pipeline, guided=guided)
    probe = probe_adjoint(Lab(adapter, bank), SAMPLING, n_directions=2)
    assert_close(probe, whole_products(adapter, bank, SAMPLING, 2))
    assert probe.unused == ("unused",)
    assert {len(values) for values in probe.numbers["unused"].values()} == {6}
    assert all(set(values) == {0.0} for values in probe.numbers["unused"].values())
    assert all(all(values) for d, c in probe.numbers.items() if d != "unused" for values in c.values())
    assert (len(probe.setting.seeds), probe.n_directions) == (3, 2)


def test_rounded_inputs_are_one_more_change():
    adapter, bank = made(formats=FORMATS, dtype=torch.float32)
    probe = probe_adjoint(Lab(adapter, bank), SAMPLING, n_directions=2)
    assert list(probe.numbers["first"]) == ["uaq3", "uaq4", "a4", "a8"]  # a codebook would be larger
    assert_close(probe, whole_products(adapter, bank, SAMPLING, 2), FLOAT32_FORMULA)
    together = probe.total("first", Format.parse("uaq4a8").changes)
    assert together.shape == (3, 2)
    alone = [np.array(probe.numbers["first"][name]) for name in ("uaq4", "a8")]
    assert together.ravel().tolist() == (alone[0] + alone[1]).tolist()
    assert not probe.total("first", ()).any()
    with pytest.raises(InputError, match="no first at kma2"):
        probe.total("first", ("kma2",))


def test_their_mean_square_is_what_a_change_of_weights_does():
    """A change so small that the first order is all there is, against the latents that it gives."""
    adapter, bank = made()
    probe = probe_adjoint(Lab(adapter, bank), SAMPLING, n_directions=60)
    before, small = adapter.sample(SAMPLING).double(), 1e-3
    _, change = next(iter(bank.changes("conv_in")))
    with torch.no_grad():
        adapter.denoiser.conv_in.weight.add_(change, alpha=small)
    noise = (adapter.sample(SAMPLING).double() - before).flatten(1).norm(dim=1) / small
    expected = (noise / before.flatten(1).norm(dim=1)).square().numpy()
    got = np.square(probe.total("conv_in", ("uaq3",))).mean(axis=1)
    assert got == pytest.approx(expected, rel=SAMPLED)
    assert got.mean() == pytest.approx(expected.mean(), rel=SAMPLED_MEAN)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_samples_do_not_depend_on_their_batch(batch_size):
    adapter, bank = made(formats="uaq3,uaq4a8,fp16", dtype=torch.float32)
    whole = probe_adjoint(Lab(adapter, bank), SAMPLING)
    assert_same_numbers(whole, probe_adjoint(Lab(adapter, bank), replace(SAMPLING, batch_size=batch_size)))
    one = probe_adjoint(Lab(adapter, bank), list(replace(SAMPLING, batch_size=1).batches())[1])
    for decision, changes in one.numbers.items():
        for name, values in changes.items():
            expected = whole.numbers[decision][name][4:8]
            assert values == pytest.approx(expected, rel=FLOAT32_FORMULA, abs=FLOAT32_FORMULA * max(map(abs, expected)))


def test_numbers_depend_neither_on_rows_nor_on_memory(monkeypatch):
    class WithoutTime(ToyDenoiser):
        def forward(self, sample, timestep, label=None, return_dict=True):
            return super().forward(sample, torch.zeros_like(timestep), label, return_dict)

    torch.manual_seed(3)
    adapter, bank = made(WithoutTime())
    whole = probe_adjoint(Lab(adapter, bank), SAMPLING)
    for max_rows in (1, 2, 4):
        with monkeypatch.context() as few:
            few.setattr(taps, "MAX_ROWS", max_rows)
            assert_same_numbers(whole, probe_adjoint(Lab(adapter, bank), SAMPLING))
    assert len(passes(bank.space, 1000)) > 3
    adapter.n_runs = 0
    monkeypatch.setattr(adjoint, "MEMORY_BYTES", 1000)
    assert_same_numbers(whole, probe_adjoint(Lab(adapter, bank), SAMPLING))
    assert adapter.n_runs == 1  # whatever does not fit together is measured on one run


def test_weight_changes_of_one_pass_at_a_time_are_in_memory(monkeypatch):
    adapter, bank = made()
    loaded, most = [], 0

    def counted(*arguments):
        nonlocal most
        loaded.append(weakref.ref(found := weight_changes(*arguments)))
        most = max(most, sum(one() is not None for one in loaded))
        return found

    monkeypatch.setattr(taps, "weight_changes", counted)
    monkeypatch.setattr(adjoint, "MEMORY_BYTES", 1000)
    probe_adjoint(Lab(adapter, bank), replace(SAMPLING, batch_size=1))
    assert most == max(map(len, passes(bank.space, 1000))) < len(loaded) / 3


def test_layers_that_mix_samples_are_looked_at_one_sample_at_a_time(caplog):
    adapter, bank = made()
    with caplog.at_level("INFO", logger="sedimo.methods.taps"):
        probe = probe_adjoint(Lab(adapter, bank), SAMPLING)
    assert "rows of time belong to several samples; one sample at a time from now on" in caplog.text
    values = np.reshape(probe.numbers["time"]["uaq3"], (3, 4))
    assert len({tuple(row) for row in values.tolist()}) == 3


def test_inputs_that_are_overwritten_do_not_spoil_the_result(caplog):
    class InPlace(ToyDenoiser):
        overwrites = True

        def forward(self, sample, timestep, label=None, return_dict=True):
            tokens = self.conv_in(sample).flatten(2).transpose(1, 2)
            added = self.first(tokens)
            tokens = tokens.add_(added) if self.overwrites else tokens + added
            output = self.out(torch.tanh(tokens).transpose(1, 2).reshape(-1, 8, 4, 4))
            return {"sample": output} if return_dict else (output,)

    adapter, bank = made(InPlace())
    with caplog.at_level("INFO", logger="sedimo.methods.taps"):
        overwriting = probe_adjoint(Lab(adapter, bank), SAMPLING)
    assert "'first' was overwritten" in caplog.text
    adapter.denoiser.overwrites = False
    assert probe_adjoint(Lab(adapter, bank), SAMPLING).numbers == overwriting.numbers


def test_a_weight_used_behind_the_layers_back_is_refused():
    class Hidden(ToyDenoiser):
        def forward(self, sample, timestep, label=None, return_dict=True):
            output = super().forward(sample, timestep, label)["sample"] * (1 + self.unused.weight.mean())
            return {"sample": output} if return_dict else (output,)

    adapter, bank = made(Hidden())
    with pytest.raises(UnsupportedError, match="'unused' is used without calling"):
        probe_adjoint(Lab(adapter, bank), SAMPLING)
    assert all(p.requires_grad for p in adapter.denoiser.parameters())
    assert not any(m._forward_hooks for m in adapter.denoiser.modules())


@pytest.mark.parametrize("factor", [0.0, torch.nan, torch.inf])
def test_latents_that_noise_has_no_measure_beside_are_refused(factor):
    class Spoiling(ToyScheduler):
        def step(self, model_output, timestep, sample):
            return super().step(factor * model_output, timestep, factor * sample)

    adapter, bank = made(scheduler=Spoiling())
    with pytest.raises(InputError, match=r"final latents, whose norm must be positive and finite, .* sample: error"):
        probe_adjoint(Lab(adapter, bank), SAMPLING)


class Interrupting:
    """Asks to stop when the first part is finished."""

    def start(self, total, label):
        self.total, self.left = total, 1

    def advance(self, n=1):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)

    def done(self):
        pass


def test_an_interrupted_probe_goes_on_and_measures_nothing_twice(tmp_path):
    adapter, bank = made()
    single = replace(SAMPLING, batch_size=1)
    whole = probe_adjoint(Lab(adapter, bank), single)
    with Study(tmp_path) as study:
        progress, adapter.n_runs = Interrupting(), 0
        with pytest.raises(Interrupted, match="same command again"):
            probe_adjoint(Lab(adapter, bank, study=study, progress=progress), single)
        assert (progress.total, len(study.probe_keys()), adapter.n_runs) == (3, 1, 1)
    with Study(tmp_path) as study:
        resumed = probe_adjoint(Lab(adapter, bank, study=study), single)
        assert (resumed.numbers, resumed.unused, adapter.n_runs) == (whole.numbers, whole.unused, 3)
        calls = []
        handle = adapter.denoiser.register_forward_hook(lambda *_: calls.append(1))
        with study.ledger() as used:
            again = probe_adjoint(Lab(adapter, bank, study=study), single)
        handle.remove()
        assert (again, calls, adapter.n_runs) == (resumed, [], 3)
        n_calls = sum(one.n_calls for one in used.parts.values())
        assert n_calls == 3 * 2 * SAMPLING.n_steps + 3  # forth and back, and one for what is unused


def test_other_directions_samples_and_formats_are_other_measurements(tmp_path):
    adapter, bank = made()
    _, more = made(formats="uaq3,kmc4,uaq5,fp16")
    with Study(tmp_path) as study:
        first = probe_adjoint(Lab(adapter, bank, study=study), SAMPLING)
        others = [
            probe_adjoint(Lab(adapter, bank, study=study), SAMPLING, n_directions=1),
            probe_adjoint(Lab(adapter, bank, study=study), replace(SAMPLING, n_steps=2)),
            probe_adjoint(Lab(adapter, more, study=study), SAMPLING),
        ]
        assert len(study.probe_keys()) == 4
    assert all(one.numbers != first.numbers for one in others)
    assert others[2].numbers["out"]["uaq3"] == first.numbers["out"]["uaq3"]
