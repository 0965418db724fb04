"""Ranges of inputs against inputs that were kept whole."""

from __future__ import annotations

import pytest
import torch

from sedimo.bank import Bank
from sedimo.codec import from_json, to_json
from sedimo.errors import InputError
from sedimo.lab.lab import Lab
from sedimo.lab.study import Study
from sedimo.pipelines import trajectory
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.trajectory import record
from sedimo.treatments import ranges
from sedimo.treatments.ranges import ChannelRange, RangesProbe, probe_ranges
from toy_pipeline import ToyAdapter, ToyWeights, toy_space

SAMPLING = Sampling(seeds=(1, 2, 3), n_steps=2, batch_size=2)
LAYERS = ("conv_in", "grouped", "time", "first", "second", "twice", "unused", "out")


def probed(adapter, study=None, layers=LAYERS):
    bank = Bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser), ())
    return probe_ranges(Lab.on(adapter, bank, study=study), layers, SAMPLING)


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
def test_ranges_are_those_of_all_inputs(guided, max_rows, monkeypatch):
    monkeypatch.setattr(trajectory, "MAX_ROWS", max_rows)
    adapter = ToyAdapter(guided=guided)
    probe = probed(adapter)
    assert probe.n_samples == 3
    for step, part in enumerate(probe.parts):
        assert set(part.ranges) == set(LAYERS) - {"unused"}
        for layer, found in part.ranges.items():
            whole = inputs_of(adapter, layer, step)
            torch.testing.assert_close(torch.tensor(found.low), whole.amin(1), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(torch.tensor(found.high), whole.amax(1), rtol=1e-5, atol=1e-6)


def test_over_time_is_the_widest():
    probe = probed(ToyAdapter())
    low = torch.tensor([part.ranges["twice"].low for part in probe.parts]).amin(0)
    high = torch.tensor([part.ranges["twice"].high for part in probe.parts]).amax(0)
    found = probe.over_time("twice")
    assert torch.equal(torch.tensor(found.low), low)
    assert torch.equal(torch.tensor(found.high), high)
    assert torch.equal(torch.tensor(probe.largest("twice")).float(), torch.maximum(low.abs(), high.abs()))
    assert probe.over_time("unused") is None
    assert probe.largest("unused") is None


def test_the_record_is_json():
    probe = probed(ToyAdapter())
    assert from_json(RangesProbe, to_json(probe)) == probe


def test_a_study_keeps_the_parts(tmp_path, monkeypatch):
    with Study(tmp_path) as study:
        first = probed(ToyAdapter(), study)
        monkeypatch.setattr(ranges, "_measure_part", lambda *_: pytest.fail("measured again"))
        assert probed(ToyAdapter(), study).parts == first.parts
        monkeypatch.setattr(ranges, "_measure_part", lambda *_: first.parts[0])
        assert len(study.probe_keys()) == 2
        probed(ToyAdapter(), study, layers=("first",))  # other layers are another part
        assert len(study.probe_keys()) == 4


def test_a_range_has_low_below_high():
    with pytest.raises(InputError, match="low <= high"):
        ChannelRange((1.0,), (0.0,))
