"""The matrix of network orthogonality against linear CKA by its other formula, on outputs that are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import sedimo
from sedimo.bank import fit_bank
from sedimo.errors import InputError
from sedimo.lab.lab import Lab
from sedimo.lab.study import Study
from sedimo.methods import orthogonality
from sedimo.methods.orthogonality import measure_part, probe_orthogonality
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import calls_by_step, joined_calls, record
from tolerances import FLOAT32_FORMULA, FLOAT32_NETWORK, FLOAT32_SAMPLING, FLOAT32_SUM
from toy_pipeline import ToyAdapter, ToyWeights, toy_space


class Branches(nn.Module):
    """Three layers on the same input, one that repeats the first, one that gives the same for all samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other, self.repeated = (nn.Linear(6, 5) for _ in range(3))
        self.fixed = nn.Linear(3, 4)
        self.repeated.weight.data = 3 * self.one.weight.data
        self.repeated.bias.data = self.one.bias.data + 2

    def forward(self, x):
        self.fixed(torch.ones(len(x), 3))
        return (self.one(x) + self.other(x) * self.repeated(x),)


LAYERS = ("one", "other", "repeated", "fixed")


def call_of(n_rows):
    denoiser, inputs = Branches(), {"x": torch.randn(n_rows, 7, 6, generator=torch.Generator().manual_seed(1))}
    return denoiser, DenoiserCall(0, 500.0, inputs, denoiser(**inputs)[0])


def features_cka(first, second):
    """|Y^T X|^2 / (|X^T X| |Y^T Y|) of column-centred features, in float64."""
    x, y = (t.double().flatten(1) for t in (first, second))
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def outputs_of(denoiser, call):
    kept = {}
    handles = [
        denoiser.get_submodule(n).register_forward_hook(lambda _m, _i, o, n=n: kept.update({n: o.detach()}))
        for n in LAYERS
    ]
    denoiser(**call.inputs)
    for handle in handles:
        handle.remove()
    return kept


def upper(part):
    found = np.eye(len(LAYERS))
    found[np.triu_indices(len(LAYERS), 1)] = part.upper
    return found


def test_entries_are_linear_cka_of_the_outputs():
    denoiser, call = call_of(12)
    found, kept = upper(measure_part(denoiser, LAYERS, call, 12)), outputs_of(denoiser, call)
    assert found[0, 1] == pytest.approx(features_cka(kept["one"], kept["other"]), rel=FLOAT32_NETWORK)
    assert found[1, 2] == pytest.approx(features_cka(kept["other"], kept["repeated"]), rel=FLOAT32_NETWORK)
    assert found[0, 2] == pytest.approx(1.0, abs=FLOAT32_FORMULA)  # scaled and shifted, but the same
    assert 0 < found[0, 1] < 1


def test_layers_that_do_not_differ_between_samples_are_told_apart():
    denoiser, call = call_of(12)
    part = measure_part(denoiser, LAYERS, call, 12)
    assert part.constant == ("fixed",)
    assert upper(part)[:3, 3].tolist() == [0, 0, 0]


def test_rows_of_a_sample_are_features_of_that_sample():
    denoiser, call = call_of(12)
    found, kept = upper(measure_part(denoiser, LAYERS, call, 6)), outputs_of(denoiser, call)
    together = [torch.cat([kept[n][:6], kept[n][6:]], dim=1) for n in ("one", "other")]
    assert found[0, 1] == pytest.approx(features_cka(*together), rel=FLOAT32_NETWORK)


@pytest.mark.parametrize(("n_samples", "max_rows"), [(12, 4), (12, 10), (12, 11), (6, 8)])
def test_samples_in_parts_give_the_same_matrix(n_samples, max_rows):
    denoiser, call = call_of(12)
    whole, parts = (measure_part(denoiser, LAYERS, call, n_samples, rows) for rows in (64, max_rows))
    assert np.allclose(upper(parts), upper(whole), rtol=FLOAT32_NETWORK)
    assert np.allclose(parts.replicates, whole.replicates, rtol=FLOAT32_NETWORK)


def test_replicates_leave_samples_out():
    denoiser, call = call_of(12)
    part, kept = measure_part(denoiser, LAYERS, call, 12), outputs_of(denoiser, call)
    assert len(part.replicates) == 12
    without_first = {n: kept[n][1:] for n in LAYERS[:3]}
    expected = sum(features_cka(without_first["one"], without_first[n]) for n in ("other", "repeated"))
    assert part.replicates[0][0] == pytest.approx(expected, rel=FLOAT32_NETWORK)


def test_hooks_are_gone_afterwards():
    denoiser, call = call_of(4)
    measure_part(denoiser, LAYERS, call, 4)
    assert not any(module._forward_hooks for module in denoiser.modules())


def test_a_pipeline_is_probed_at_uniform_timesteps_and_resumes(tiny_pipeline_folder, tmp_path, monkeypatch):
    pipe = sedimo.load(tiny_pipeline_folder)
    plan = pipe.default_sampling(range(6), 5)
    layers = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2", "proj_out_2")
    how = {"n_timesteps": 3}
    with Study(tmp_path) as study:
        found = probe_orthogonality(Lab(pipe, study=study), layers, plan, **how)
        calls = record(pipe, plan).calls
        assert [part.timestep for part in found.parts] == [calls[i].timestep for i in (0, 2, 4)]
        assert found.matrices.shape == (3, 3, 3)
        assert np.allclose(found.matrices, found.matrices.transpose(0, 2, 1))
        assert found.sums[:, 2] == pytest.approx(found.matrices[:, 2].sum(axis=1) - 1)
        monkeypatch.setattr("sedimo.methods.orthogonality.measure_part", None)  # would fail if it were called
        assert probe_orthogonality(Lab(pipe, study=study), layers, plan, **how).parts == found.parts


def test_too_few_samples_are_refused(tiny_pipeline_folder):
    pipe = sedimo.load(tiny_pipeline_folder)
    with pytest.raises(InputError, match="at least 4 and a timestep, got 3 samples"):
        probe_orthogonality(Lab(pipe), ("proj_out_2",), pipe.default_sampling(range(3), 2))
    with pytest.raises(InputError, match="and 0 timesteps"):
        probe_orthogonality(Lab(pipe), ("proj_out_2",), pipe.default_sampling(range(4), 2), n_timesteps=0)


class Odd(nn.Module):
    """Layers whose outputs do not begin with the batch: folded frames, sequence first, and one that follows no rule."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.folded, self.sequence, self.sorted, self.uncalled = (nn.Linear(6, 5) for _ in range(5))
        self.position = nn.Linear(6, 5)

    def forward(self, x):
        total = self.plain(x).sum() + self.folded(x.flatten(0, 1)).sum() + self.sequence(x.transpose(0, 1)).sum()
        total = total + self.sorted(x[:, 0].repeat(len(x), 1)).sum()  # of the square of the batch
        self.position(torch.ones(84, 6))  # as many rows as the batch has tokens, but no sample's
        return (x + total,)


ODD = ("plain", "folded", "sequence", "sorted", "uncalled", "position")


def odd_call(**changes):
    denoiser, x = Odd(), torch.randn(12, 7, 6, generator=torch.Generator().manual_seed(1))
    for name, value in changes.items():
        denoiser.get_submodule(name).bias.data += value
    return denoiser, DenoiserCall(0, 500.0, {"x": x}, denoiser(x)[0])


@pytest.mark.parametrize("batch_size", [4, 64])
def test_outputs_are_read_along_the_axis_that_grows_with_the_samples(batch_size):
    denoiser, call = odd_call()
    part = measure_part(denoiser, ODD, call, 12, batch_size)
    matrix = np.eye(6)
    matrix[np.triu_indices(6, 1)] = part.upper
    features = [denoiser.get_submodule(name)(call.inputs["x"]).detach() for name in ODD[:3]]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert matrix[i, j] == pytest.approx(features_cka(features[i], features[j]), rel=FLOAT32_NETWORK)
    assert (part.constant, part.unused, part.unread) == (("position",), ("uncalled",), ("sorted",))
    assert part.unknown == {"position", "uncalled", "sorted"}


def test_an_output_that_is_not_finite_is_refused():
    denoiser, call = odd_call(folded=float("nan"))
    with pytest.raises(InputError, match="layer 'folded' is not finite at timestep 500"):
        measure_part(denoiser, ODD, call, 12)


def test_all_layers_may_be_constant_at_a_timestep():
    denoiser, call = call_of(12)
    part = measure_part(denoiser, ("fixed",), call, 12)
    assert part.constant == ("fixed",)
    assert part.replicates == ((0.0,),) * 12


def test_batches_of_the_plan_give_the_matrix_of_all_samples_together(monkeypatch):
    adapter = ToyAdapter(guided=True)
    lab = Lab(adapter, fit_bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser), sample_channels=2))
    layers = ("conv_in", "grouped", "first", "twice", "out", "time", "unused")
    together, batches = (probe_orthogonality(lab, layers, Sampling(tuple(range(7)), 3, batch_size=b)) for b in (7, 3))
    assert np.allclose(batches.matrices, together.matrices, rtol=FLOAT32_SAMPLING, atol=FLOAT32_FORMULA)
    assert batches.parts[0].unused == ("unused",)
    assert batches.parts[0].constant == ("time",)
    rows = []
    handle = adapter.denoiser.conv_in.register_forward_hook(lambda _m, a, _o: rows.append(len(a[0])))
    probe_orthogonality(lab, layers, Sampling(tuple(range(7)), 3, batch_size=3))
    assert max(rows) == 6  # two rows per sample: never more at once than the plan allows
    monkeypatch.setattr(orthogonality, "MEMORY_BYTES", 1)
    rows.clear()
    small = probe_orthogonality(lab, layers, Sampling(tuple(range(7)), 3, batch_size=7))
    handle.remove()
    assert rows[3:].count(4) == 3 * 21  # each pair of samples by itself, after the trajectory
    assert np.allclose(small.matrices, together.matrices, rtol=FLOAT32_SAMPLING, atol=FLOAT32_FORMULA)


@pytest.mark.parametrize("guided", [False, True])
def test_joined_calls_are_the_call_of_all_samples(guided):
    adapter = ToyAdapter(guided=guided)
    one, several = (Sampling(tuple(range(5)), 2, batch_size=b) for b in (5, 2))
    whole = record(adapter, one).calls
    joined = [joined_calls(batches) for batches in calls_by_step(several, record(adapter, several).calls)]
    for expected, found in zip(whole, joined, strict=True):
        assert found.inputs.keys() == expected.inputs.keys()
        for name, value in expected.inputs.items():
            assert torch.allclose(found.inputs[name], value, atol=FLOAT32_SUM)
        assert torch.allclose(found.output, expected.output, atol=FLOAT32_SUM)


def test_recorded_steps_are_uniform_in_every_batch():
    adapter, plan = ToyAdapter(), Sampling(tuple(range(5)), 9, batch_size=2)
    everything, some = record(adapter, plan).calls, record(adapter, plan, at_most=3).calls
    assert [call.step for call in some] == [0, 4, 8] * 3
    assert [call.step for call in record(adapter, plan, at_most=1).calls] == [0] * 3
    chosen = [call for call in everything if call.step in (0, 4, 8)]
    assert all(torch.equal(a.output, b.output) for a, b in zip(some, chosen, strict=True))
