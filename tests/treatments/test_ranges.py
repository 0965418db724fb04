"""Ranges of inputs against inputs that were kept whole."""

from __future__ import annotations

import pytest
import torch

from sedimo.bank import Bank
from sedimo.errors import InputError
from sedimo.lab.lab import Lab
from sedimo.lab.study import Study
from sedimo.pipelines import trajectory
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.trajectory import record
from sedimo.quant.activations import InputRange
from sedimo.treatments import smoothing
from sedimo.treatments.smoothing import RangesPart, probe_ranges
from tolerances import FLOAT32_FORMULA, FLOAT32_SUM
from toy_pipeline import ToyAdapter, ToyWeights, toy_space

SAMPLING = Sampling(seeds=(1, 2, 3), n_steps=2, batch_size=2)
LAYERS = ("conv_in", "grouped", "time", "first", "second", "twice", "unused", "out")


def probed(adapter, study=None, layers=LAYERS):
    bank = Bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser), ())
    return probe_ranges(Lab(adapter, bank, study=study), layers, SAMPLING)


def inputs_of(adapter, layer, step):
    """All inputs of a layer at one step, `[C, n]`."""
    kept = []
    module = adapter.denoiser.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    for call in record(ToyAdapter(guided=adapter.guided), SAMPLING).calls:
        if call.step == step:
            with torch.no_grad():
                adapter.denoiser(**call.inputs)
    handle.remove()
    axis = 1 if isinstance(module, torch.nn.Conv2d) else -1
    return torch.cat([x.movedim(axis, 0).flatten(1) for x in kept], dim=1)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("max_rows", [1, 64])
def test_ranges_are_those_of_all_inputs_at_each_step_and_over_all(guided, max_rows, monkeypatch, tmp_path):
    monkeypatch.setattr(trajectory, "MAX_ROWS", max_rows)
    with Study(tmp_path) as study:
        over_time = probed(ToyAdapter(guided=guided), study)
        steps = [study.probe(RangesPart, key) for key in study.probe_keys()]
    steps.sort(key=lambda part: -part.timestep)
    inputs = [{layer: inputs_of(ToyAdapter(guided=guided), layer, step) for layer in over_time} for step in range(2)]
    inputs.append({layer: torch.cat([seen[layer] for seen in inputs], dim=1) for layer in over_time})
    for ranges, seen in zip([*(part.ranges for part in steps), over_time], inputs, strict=True):
        assert set(ranges) == set(LAYERS) - {"unused"}
        for layer, found in ranges.items():
            for ours, theirs in ((found.low, seen[layer].amin(1)), (found.high, seen[layer].amax(1))):
                torch.testing.assert_close(torch.tensor(ours), theirs, rtol=FLOAT32_FORMULA, atol=FLOAT32_SUM)


def test_a_study_keeps_the_parts(tmp_path, monkeypatch):
    with Study(tmp_path) as study:
        first = probed(ToyAdapter(), study)
        monkeypatch.setattr(smoothing, "_measure_part", lambda *_: pytest.fail("measured again"))
        assert probed(ToyAdapter(), study) == first
        monkeypatch.setattr(smoothing, "_measure_part", lambda *_: RangesPart(1.0, first))
        assert len(study.probe_keys()) == 2
        probed(ToyAdapter(), study, layers=("first",))  # other layers are another part
        assert len(study.probe_keys()) == 4


def test_a_range_has_low_below_high():
    with pytest.raises(InputError, match=r"low <= high.*got 1.0 and 0.0"):
        InputRange((0.0, 1.0), (2.0, 0.0))
    with pytest.raises(InputError, match=r"got 1 and 2 of them"):
        InputRange((0.0,), (2.0, 3.0))


def test_inputs_that_have_no_range_are_refused_by_the_name_of_their_layer():
    adapter = ToyAdapter()
    with torch.no_grad():
        adapter.denoiser.first.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"layer 'second': ranges .*got nan and nan; use another --dtype"):
        probed(adapter)
