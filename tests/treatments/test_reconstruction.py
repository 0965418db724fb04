"""Block reconstruction on the toy pipeline, against all roundings and against direct calls."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from sedimo.bank import Bank
from sedimo.errors import InputError, Interrupted, StateError
from sedimo.graph.model import DenoiserGraph, Node
from sedimo.lab.exchange import probed
from sedimo.lab.lab import Lab
from sedimo.lab.study import Study
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.trajectory import record
from sedimo.space import Recipe
from sedimo.treatments import learned_rounding as reconstruction
from sedimo.treatments.learned_rounding import capture, capture_outputs, reconstruct, slices, units_of
from tolerances import FLOAT32_NETWORK, FLOAT32_SUM
from toy_pipeline import ToyAdapter, ToyWeights, toy_space

SAMPLING = Sampling(seeds=(1, 2, 3), n_steps=3, batch_size=2)
N_STEPS = 40
GAIN_SHARE = 0.75  # of what the best of all roundings gains over nearest; this layer is ill-conditioned


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(reconstruction, "LEARNING_RATE", 3e-2)
    monkeypatch.setattr(reconstruction, "BATCH_ROWS", 4)


def node(name, module, block=""):
    return Node(name, "layer", name, block, 1, "Linear", tuple(module.weight.shape))


def toy(text="uaq2", guided=False):
    """Adapter, graph, bank, and every layer in one format."""
    adapter = ToyAdapter(guided=guided)
    names = [n for n, m in adapter.denoiser.named_modules() if hasattr(m, "weight") and n != "unused"]
    nodes = tuple(node(n, adapter.denoiser.get_submodule(n)) for n in names)
    graph = DenoiserGraph("ToyDenoiser", nodes, (), (), (("first", "second"),))
    space = toy_space(adapter.denoiser, f"{text},kma2,fp16")
    recipe = Recipe.from_mapping(dict.fromkeys(names, text))
    return adapter, graph, Bank(ToyWeights(adapter.denoiser), space, ()), recipe


def only(recipe, *names):
    return Recipe({n: f for n, f in recipe.layers.items() if n in names})


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["conv_in", "time", "twice", "out"])
def test_captured_rows_reproduce_the_module(name, guided):
    adapter, *_ = toy(guided=guided)
    calls = record(adapter, SAMPLING).calls
    outputs = capture_outputs(adapter.denoiser, name, calls)
    parts = capture(adapter.denoiser, name, calls, outputs)
    module = adapter.denoiser.get_submodule(name)
    assert sum(part.n_rows for part in parts) == sum(len(tensors[0]) for tensors in outputs)
    assert len(outputs) == len(calls) * (2 if name == "twice" else 1)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for part in slices(parts, 3):
        assert part.n_rows <= 3
        assert float(part.squared_error(module, {})) < 1e-10
        assert float(part.squared_error(module, {"weight": torch.zeros_like(module.weight.detach())})) > 1e-3


def test_one_small_layer_gains_most_of_what_the_best_of_all_roundings_gains(monkeypatch):
    adapter, graph, bank, recipe = toy()
    monkeypatch.setattr(reconstruction, "BATCH_ROWS", 64)
    found = reconstruct(Lab(adapter, bank, graph=graph), bank, only(recipe, "out"), SAMPLING, n_steps=200)
    (block,) = found.blocks
    assert block.learned_error < block.nearest_error
    calls = record(adapter, SAMPLING).calls
    (data,) = capture(adapter.denoiser, "out", calls, capture_outputs(adapter.denoiser, "out", calls))
    tokens = data.inputs[0][0].permute(0, 2, 3, 1).reshape(-1, 8).double()
    (part,) = bank.quantize(recipe)["out"].parts
    weight = adapter.denoiser.out.weight.detach().reshape(2, 8)
    ups = torch.tensor(list(itertools.product((0, 1), repeat=8)))
    total = 0.0
    for row, scale, zero in zip(
        weight, part.tensors["scale"], part.tensors["zero_point"], strict=True
    ):  # rows do not touch each other
        codes = ((row / scale).floor() + ups + zero).clamp(0, 3)
        changes = (codes - zero) * scale - row
        total += float((changes.double() @ tokens.T).square().sum(1).min())
    best = total / float(data.targets[0].double().square().sum())
    assert best * (1 - FLOAT32_SUM) <= block.learned_error
    assert block.nearest_error - block.learned_error >= GAIN_SHARE * (block.nearest_error - best)


def test_every_block_is_at_least_as_good_as_nearest_rounding_and_bytes_stay():
    adapter, graph, bank, recipe = toy("uaq3")
    before = copy.deepcopy(adapter.denoiser.state_dict())
    found = reconstruct(Lab(adapter, bank, graph=graph), bank, recipe, SAMPLING, n_steps=N_STEPS)
    nearest = bank.quantize(recipe)
    assert [b.name for b in found.blocks] == ["conv_in", "grouped", "time", "twice", "out"]  # the tied pair keeps codes
    assert all(b.error <= b.nearest_error for b in found.blocks)
    assert sum(b.is_learned for b in found.blocks) >= 3
    assert found.weights.keys() == nearest.keys()
    for layer, weight in found.weights.items():
        assert (weight.format, weight.stored_bytes) == (nearest[layer].format, nearest[layer].stored_bytes)
    assert torch.equal(found.weights["first"].codes(), nearest["first"].codes())
    assert all(torch.equal(value, before[key]) for key, value in adapter.denoiser.state_dict().items())


def test_a_block_whose_error_does_not_fall_keeps_nearest_rounding(monkeypatch):
    adapter, graph, bank, recipe = toy("uaq3")
    monkeypatch.setattr(reconstruction, "LEARNING_RATE", 100.0)
    monkeypatch.setattr(reconstruction, "BATCH_ROWS", 1)
    found = reconstruct(Lab(adapter, bank, graph=graph), bank, only(recipe, "twice", "out"), SAMPLING, n_steps=1)
    kept = [block for block in found.blocks if not block.is_learned]
    assert kept
    for block in kept:
        assert block.learned_error >= block.nearest_error == block.error
        assert torch.equal(found.weights[block.name].codes(), bank.quantize(recipe)[block.name].codes())


def test_inputs_come_from_the_quantized_layers_before_and_targets_from_full_precision():
    adapter, graph, bank, recipe = toy("uaq2")
    recipe = only(recipe, "conv_in", "out")
    found = reconstruct(Lab(adapter, bank, graph=graph), bank, recipe, SAMPLING, n_steps=N_STEPS)
    calls = record(adapter, SAMPLING).calls
    targets = capture_outputs(adapter.denoiser, "out", calls)
    with probed(adapter.denoiser, found.weights):
        outputs = capture_outputs(adapter.denoiser, "out", calls)
    noise = sum(float((o[0] - t[0]).double().square().sum()) for o, t in zip(outputs, targets, strict=True))
    signal = sum(float(t[0].double().square().sum()) for t in targets)
    assert found.blocks[-1].error == pytest.approx(noise / signal, rel=FLOAT32_NETWORK)


def test_blocks_are_innermost_containers_and_other_layers_stand_alone():
    layer = torch.nn.Linear(2, 2)
    nodes = [("in", ""), ("up.0.conv", "up.0"), ("up.0.a.0.q", "up.0.a.0"), ("up.0.a.0.k", "up.0.a.0"), ("b.1", "b.1")]
    graph = DenoiserGraph("Toy", tuple(node(n, layer, b) for n, b in nodes), (), ())
    recipe = Recipe.from_mapping({"in": "kmc2", "up.0.conv": "uaq2", "up.0.a.0.k": "uaq4"})
    units = units_of(graph, recipe)
    assert [(u.name, u.learned) for u in units] == [
        ("in", ()),
        ("up.0.conv", ("up.0.conv",)),
        ("up.0.a.0", ("up.0.a.0.k",)),
        ("b.1", ()),
    ]


def test_finished_blocks_are_not_learned_again(tmp_path, monkeypatch):
    adapter, graph, bank, recipe = toy("uaq3")
    learn, n_learned = reconstruction.learn_rounding, []

    def learn_two(*args, **kwargs):
        if len(n_learned) == 2:
            raise Interrupted("killed here")
        n_learned.append(1)
        learn(*args, **kwargs)

    monkeypatch.setattr(reconstruction, "learn_rounding", learn_two)
    whole = reconstruct_with(learn, monkeypatch, adapter, graph, bank, recipe)
    monkeypatch.setattr(reconstruction, "learn_rounding", learn_two)
    with Study(tmp_path) as study:
        with pytest.raises(Interrupted):
            reconstruct(Lab(adapter, bank, graph=graph, study=study), bank, recipe, SAMPLING, n_steps=N_STEPS)
        assert len(study.probe_keys()) == 2
        monkeypatch.setattr(reconstruction, "learn_rounding", learn)
        resumed = reconstruct(Lab(adapter, bank, graph=graph, study=study), bank, recipe, SAMPLING, n_steps=N_STEPS)
        monkeypatch.setattr(reconstruction, "learn_rounding", lambda *_, **__: pytest.fail("learned again"))
        again = reconstruct(Lab(adapter, bank, graph=graph, study=study), bank, recipe, SAMPLING, n_steps=N_STEPS)
    for layer, weight in whole.weights.items():
        assert torch.equal(weight.codes(), resumed.weights[layer].codes())
        assert torch.equal(weight.codes(), again.weights[layer].codes())


def reconstruct_with(learn, monkeypatch, adapter, graph, bank, recipe):
    monkeypatch.setattr(reconstruction, "learn_rounding", learn)
    return reconstruct(Lab(adapter, bank, graph=graph), bank, recipe, SAMPLING, n_steps=N_STEPS)


def test_another_plan_recipe_or_schedule_is_learned_anew(tmp_path, monkeypatch):
    adapter, graph, bank, recipe = toy("uaq3")
    recipe = only(recipe, "out")
    with Study(tmp_path) as study:
        for sampling, entries, n_steps, seed in (
            (SAMPLING, recipe, N_STEPS, 0),
            (replace(SAMPLING, n_steps=2), recipe, N_STEPS, 0),
            (SAMPLING, Recipe.from_mapping({"out": "uaq2"}), N_STEPS, 0),
            (SAMPLING, recipe, N_STEPS, 1),
            (SAMPLING, recipe, 39, 0),
        ):
            before = len(study.probe_keys())
            monkeypatch.setattr(reconstruction, "SEED", seed)
            with_bank = bank if entries is recipe else toy("uaq2")[2]
            reconstruct(
                Lab(adapter, with_bank, graph=graph, study=study), with_bank, entries, sampling, n_steps=n_steps
            )
            assert len(study.probe_keys()) == before + 1


def test_damaged_codes_of_a_study_are_refused(tmp_path):
    adapter, graph, bank, recipe = toy("uaq3")
    recipe = only(recipe, "out")
    with Study(tmp_path) as study:
        reconstruct(Lab(adapter, bank, graph=graph, study=study), bank, recipe, SAMPLING, n_steps=N_STEPS)
        (key,) = study.probe_keys()
        block = study.probe(reconstruction.ReconstructedBlock, key)
        study.put_probe(key, replace(block, codes={"out": ("AAAA",)}))
        with pytest.raises(StateError, match="damaged"):
            reconstruct(Lab(adapter, bank, graph=graph, study=study), bank, recipe, SAMPLING, n_steps=N_STEPS)


def test_a_recipe_without_a_grid_is_refused():
    adapter, graph, bank, recipe = toy()
    with pytest.raises(InputError, match="only uaq formats"):
        reconstruct(
            Lab(adapter, bank, graph=graph),
            bank,
            Recipe.from_mapping(dict.fromkeys(recipe.layers, "kma2")),
            SAMPLING,
        )


def test_parts_at_full_precision_and_layers_that_are_never_called_are_no_trouble():
    adapter, graph, bank, _ = toy("uaq3")
    parts = [{"start": 0, "stop": 4, "format": "uaq3"}, {"start": 4, "stop": 8, "format": "fp16"}]
    recipe = Recipe.from_mapping({"twice": parts, "unused": "uaq3"})
    unused = node("unused", adapter.denoiser.unused)
    graph = DenoiserGraph("ToyDenoiser", (*graph.nodes, unused), (), ())
    found = reconstruct(Lab(adapter, bank, graph=graph), bank, recipe, SAMPLING, n_steps=N_STEPS)
    assert [b.name for b in found.blocks] == ["twice", "unused"]
    assert (found.blocks[1].n_rows, found.blocks[1].is_learned) == (0, False)
    assert found.blocks[0].n_changed <= 8 * 4 < found.blocks[0].n_weights  # only the first part has codes
    kept, nearest = found.weights["twice"].parts, bank.quantize(recipe)["twice"].parts
    assert torch.equal(kept[1].tensors["values"], nearest[1].tensors["values"])
