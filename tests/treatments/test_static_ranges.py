"""Static ranges against what the layers were given, looked at directly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, KDPM2DiscreteScheduler, PNDMScheduler

from sedimo.bank import Bank, fit_bank
from sedimo.errors import InputError
from sedimo.lab.lab import Lab
from sedimo.lab.measuring import TrialWorker
from sedimo.lab.study import Study
from sedimo.methods.jacobian import jacobian_table, probe_jacobian
from sedimo.methods.sqnr import probe_sqnr, sqnr_table
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.loading import load_pipeline
from sedimo.quant.activations import ActivationQuantizer, Activations, InputRange
from sedimo.quant.formats import Format
from sedimo.space import Recipe
from sedimo.treatments import static_ranges
from sedimo.treatments.static_ranges import ActivationSettings, calibrate, calls_of
from tolerances import FLOAT32_NETWORK
from toy_pipeline import ToyAdapter, ToyWeights, toy_space

SAMPLING = Sampling(seeds=(1, 2, 3, 4, 5), n_steps=3, batch_size=2)
LAYERS = {"conv_in": (8,), "twice": (4, 8)}
BFLOAT16 = 2**-7  # the precision that percentiles are promised to have
SAMPLED_NOISE = 0.35  # of 64 directions at each step, unequal among the values of the output


def lab_of(adapter, study=None, digest="w"):
    """A lab that ranges can be calibrated on; nothing is fitted."""
    weights = ToyWeights(adapter.denoiser, digest)
    return Lab(adapter, Bank(weights, toy_space(adapter.denoiser), ()), study=study)


class OtherCalls(ToyAdapter):
    """Calls the denoiser another number of times than it has steps, as some schedulers do."""

    def __init__(self, n_calls):
        super().__init__()
        self.calls_per_batch = n_calls

    def _batch(self, seeds, _n_steps, observer):
        return super()._batch(seeds, self.calls_per_batch, observer)


def inputs_of(adapter, layer, n_calls=SAMPLING.n_steps):
    """What a layer was given, by step, `[B, ...]` of all samples flattened."""
    found, step = {}, [0]

    def see(call):
        step[0] = (call.step + 1) % n_calls

    handle = adapter.denoiser.get_submodule(layer).register_forward_hook(
        lambda _m, args, _o: found.setdefault(step[0], []).append(args[0].flatten())
    )
    adapter.sample(SAMPLING, observer=see)
    handle.remove()
    return {at: torch.cat(parts).numpy() for at, parts in found.items()}


def ranges(adapter, layer="twice", bits=8, method="min-max", **options):
    found = calibrate(lab_of(adapter), LAYERS, SAMPLING, ActivationSettings(method, **options))
    return found.static[layer][f"a{bits}"]


@pytest.mark.parametrize(("n_steps", "looked_at"), [(1, [0]), (2, [0, 2]), (0, [0, 1, 2]), (9, [0, 1, 2])])
def test_extremes_are_those_of_the_steps_that_were_asked_for(n_steps, looked_at):
    adapter = ToyAdapter(guided=True)
    for layer in LAYERS:
        given = inputs_of(adapter, layer)
        values = np.concatenate([given[step] for step in looked_at])
        assert ranges(adapter, layer, n_steps=n_steps) == InputRange((float(values.min()),), (float(values.max()),))


@pytest.mark.parametrize("n_calls", [2, 4, 5])
def test_all_calls_are_looked_at_whatever_the_number_of_steps(n_calls):
    adapter = OtherCalls(n_calls)
    given = inputs_of(adapter, "twice", n_calls)
    assert sorted(given) == list(range(n_calls))
    options = ActivationSettings("min-max", by_timestep=True)
    found = calibrate(lab_of(adapter), LAYERS, SAMPLING, options)
    assert found.timesteps == pytest.approx([1 - step / n_calls for step in range(n_calls)])
    assert found.static["twice"]["a8"].high == tuple(float(given[step].max()) for step in range(n_calls))


def test_nothing_is_sampled_past_the_last_step_that_is_looked_at():
    adapter = ToyAdapter()
    ranges(adapter, n_steps=1)
    assert adapter.n_calls == 3  # one step of each of the three batches


def test_each_timestep_can_have_ranges_of_its_own():
    adapter = ToyAdapter()
    given = inputs_of(adapter, "conv_in")
    options = ActivationSettings("min-max", by_timestep=True)
    found = calibrate(lab_of(adapter), LAYERS, SAMPLING, options)
    assert found.timesteps == pytest.approx((1.0, 2 / 3, 1 / 3))
    assert found.static["conv_in"]["a8"].high == tuple(float(given[step].max()) for step in range(3))


@pytest.mark.parametrize(
    ("n_steps", "n_calls", "wanted"),
    [
        (0, 5, (0, 1, 2, 3, 4)),
        (1, 5, (0,)),
        (2, 5, (0, 1, 4)),
        (3, 5, (0, 1, 2, 3, 4)),
        (2, 4, (0, 1, 3)),
        (2, 3, (0, 2)),
    ],
)
def test_a_step_is_all_calls_that_it_takes(n_steps, n_calls, wanted):
    assert calls_of(n_steps, 3, n_calls) == wanted


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of KDPM2's own tables
@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, KDPM2DiscreteScheduler, PNDMScheduler])
def test_calls_belong_to_the_steps_of_real_schedulers(kind):
    scheduler = kind(**({"skip_prk_steps": True} if kind is PNDMScheduler else {}))
    scheduler.set_timesteps(7)
    n_calls = len(scheduler.timesteps)
    first = (0, 1)
    last = {HeunDiscreteScheduler: (8, 9), KDPM2DiscreteScheduler: (8, 9), PNDMScheduler: (5,)}[kind]
    assert calls_of(2, 7, n_calls) == (*first, *last)  # steps 0 and 4
    assert calls_of(0, 7, n_calls) == tuple(range(n_calls))


def test_both_calls_of_a_step_are_looked_at(tiny_pipeline_folder):
    """Heun takes 5 calls for 3 steps, two each but for the last."""
    pipe = load_pipeline(str(tiny_pipeline_folder))
    pipe.pipeline.scheduler = HeunDiscreteScheduler.from_config(pipe.pipeline.scheduler.config)
    lab, plan = Lab(pipe), replace(pipe.default_sampling(range(3), 3), batch_size=2)
    given, times = [], []
    handle = pipe.denoiser.proj_out_2.register_forward_hook(lambda _m, args, _o: given.append(args[0].aminmax()))
    pipe.sample(plan, observer=lambda call: times.append(call.timestep))
    handle.remove()
    assert len(times) == 2 * 5  # two batches

    def wanted(*calls):
        pairs = [given[batch + call] for batch in (0, 5) for call in calls]
        return min(float(low) for low, _ in pairs), max(float(high) for _, high in pairs)

    def found(**options):
        return calibrate(lab, {"proj_out_2": (8,)}, plan, ActivationSettings("min-max", **options))

    for n_steps, calls in ((0, range(5)), (1, [0]), (2, [0, 1, 4])):
        static = found(n_steps=n_steps).static["proj_out_2"]["a8"]
        assert (*static.low, *static.high) == wanted(*calls)
    by_timestep = found(by_timestep=True)
    assert times[1:5:2] == times[2:5:2]
    assert by_timestep.timesteps == (times[0], times[1], times[3])
    static = by_timestep.static["proj_out_2"]["a8"]
    assert list(zip(static.low, static.high, strict=True)) == [wanted(0), wanted(1, 2), wanted(3, 4)]


@pytest.mark.parametrize("percentile", [99.0, 90.0, 100.0])
def test_percentiles_are_those_of_the_values_to_the_precision_of_bfloat16(percentile, monkeypatch):
    monkeypatch.setattr(static_ranges, "PERCENTILE", percentile)
    adapter = ToyAdapter()
    given = np.concatenate(list(inputs_of(adapter, "twice").values()))
    found = ranges(adapter, method="percentile", n_steps=0)
    low, high = np.percentile(given, [100 - percentile, percentile], method="inverted_cdf")
    assert found.low[0] == pytest.approx(low, rel=BFLOAT16)
    assert found.high[0] == pytest.approx(high, rel=BFLOAT16)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_range_of_least_error_is_no_worse_than_any_shrunk_one(symmetric):
    adapter = ToyAdapter()
    given = torch.from_numpy(np.concatenate(list(inputs_of(adapter, "twice").values())))
    found = ranges(adapter, bits=4, method="mse", n_steps=0, symmetric=symmetric)

    def error(low, high):
        quantizer = ActivationQuantizer(4, symmetric, InputRange((low,), (high,)))
        return float((quantizer(given) - given).square().mean())

    others = [error(float(given.min()) * f, float(given.max()) * f) for f in np.linspace(0.05, 1, 60)]
    assert error(found.low[0], found.high[0]) <= min(others) * 1.02
    assert error(found.low[0], found.high[0]) < others[-1]


def test_ranges_are_kept_in_the_study_under_all_that_determines_them(tmp_path):
    adapter = ToyAdapter()
    with Study(tmp_path) as study:
        first = calibrate(lab_of(adapter, study), LAYERS, SAMPLING, ActivationSettings("min-max"))
        calls = adapter.n_calls
        assert calibrate(lab_of(adapter, study), LAYERS, SAMPLING, ActivationSettings("min-max")) == first
        assert adapter.n_calls == calls
        calibrate(lab_of(adapter, study, "other"), LAYERS, SAMPLING, ActivationSettings("min-max"))
        assert adapter.n_calls > calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranges": "magic"}, "min-max, percentile, mse, got 'magic'"),
        ({"ranges": "mse", "n_steps": -1}, "steps must be at least 0, got -1"),
        ({"n_samples": 0}, "n_samples must be at least 1, got 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ActivationSettings(**options)


def test_layers_without_a_range_are_named():
    adapter = ToyAdapter()
    with pytest.raises(InputError, match="'unused' was never called"):
        calibrate(lab_of(adapter), {"unused": (8,)}, SAMPLING, ActivationSettings("min-max"))
    with torch.no_grad():
        adapter.denoiser.first.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="'twice': its inputs hold NaN"):
        calibrate(lab_of(adapter), LAYERS, SAMPLING, ActivationSettings("min-max"))


@pytest.mark.parametrize("rules", ["dynamic", "static", "by timestep"])
def test_recipes_with_activation_bits_are_measured_with_rounded_inputs(rules):
    """By an oracle that rounds the inputs of one layer by hand."""
    adapter = ToyAdapter()
    bank = fit_bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser, "uaq8,fp16,fp16a4"))
    if rules != "dynamic":
        options = ActivationSettings("min-max", by_timestep=rules == "by timestep")
        static = calibrate(lab_of(adapter), {"out": (4,)}, SAMPLING, options)
        bank = bank.rounding(static)
    worker = TrialWorker(adapter, bank, SAMPLING, objective="final_latents")
    trial = worker.measure(Recipe.from_mapping({"out": "fp16a4"}))
    worker.measure(Recipe.from_mapping({"out": "uaq8"}))
    assert worker.measure(Recipe.from_mapping({"out": "fp16a4"})).powers.signal.tolist() == trial.powers.signal.tolist()
    worker.close()
    plain, step = adapter.sample(SAMPLING), [0]

    def by_hand(module, args):
        x = args[0]
        if rules == "dynamic":
            low, high = x.amin((1, 2, 3), keepdim=True).clamp(max=0), x.amax((1, 2, 3), keepdim=True).clamp(min=0)
        else:
            found = static.static["out"]["a4"]
            at = min(step[0] % SAMPLING.n_steps, len(found.low) - 1)
            low, high = torch.tensor(min(found.low[at], 0.0)), torch.tensor(max(found.high[at], 0.0))
        step[0] += 1
        scale = (high - low) / 15
        zero = (-low / scale).round()
        return (((x / scale).round() + zero).clamp(0, 15) - zero) * scale

    handle = adapter.denoiser.out.register_forward_pre_hook(by_hand)
    rounded = adapter.sample(SAMPLING)
    handle.remove()
    noise = (rounded - plain).double().square().flatten(1).sum(1)
    assert trial.powers.noise.tolist() == pytest.approx(noise.tolist(), rel=FLOAT32_NETWORK)


def test_other_rules_give_trials_other_names():
    adapter = ToyAdapter()
    bank = fit_bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser))
    assert bank.digest == bank.weights_digest
    assert bank.rounding(Activations(symmetric=True)).digest != bank.digest


def test_probes_add_the_noise_of_activations_to_that_of_weights():
    adapter = ToyAdapter()
    space = toy_space(adapter.denoiser, "uaq4,uaq4a4,fp16,fp16a4")
    bank = fit_bank(ToyWeights(adapter.denoiser), space)
    worker = TrialWorker(adapter, bank, SAMPLING, objective="step")
    by_step = worker.measure(Recipe.from_mapping({"out": "fp16a4"})).powers.ratio.mean()
    worker.close()
    jacobian = jacobian_table(space, bank.candidates, probe_jacobian(Lab(adapter, bank), SAMPLING, n_directions=64))
    local = sqnr_table(space, bank.candidates, probe_sqnr(Lab(adapter, bank), SAMPLING))
    for table in (jacobian, local):
        cost = {str(c.format): c.cost for c in table.costs if c.decision == "out"}
        assert cost["fp16"] == 0
        assert cost["uaq4a4"] == pytest.approx(cost["uaq4"] + cost["fp16a4"], rel=FLOAT32_NETWORK)
        assert cost["fp16a4"] == pytest.approx(by_step, rel=SAMPLED_NOISE)  # the last layer: its noise is the output's


def test_a_probe_of_activations_only_needs_no_weight_format():
    adapter = ToyAdapter()
    space = toy_space(adapter.denoiser, "fp16,fp16a8,fp16a4")
    bank = fit_bank(ToyWeights(adapter.denoiser), space)
    found = probe_jacobian(Lab(adapter, bank), SAMPLING)
    assert found.numbers["out"].keys() == {"a4", "a8"}
    table = jacobian_table(space, bank.candidates, found)
    cost = {c.format: c.cost for c in table.costs if c.decision == "out"}
    assert cost[Format.parse("fp16a4")] > cost[Format.parse("fp16a8")] > 0
