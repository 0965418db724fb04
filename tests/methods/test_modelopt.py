"""NVIDIA ModelOpt itself, where it is installed: its formats, scores, programme and weights."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from sedimo.lab.bench import trace
from sedimo.lab.lab import Lab
from sedimo.lab.study import Study
from sedimo.methods import modelopt
from sedimo.methods.modelopt import FORMATS, PER_CHANNEL, IntFormat, ModelOptScores, grouped
from sedimo.pipelines.loading import load_pipeline
from sedimo.space import search_space
from tolerances import FLOAT64_FORMULA

ON_GRID = 1e-3  # of a step: float32 rounding of the scale and of up to 127 steps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("modelopt") is None, reason="the extra `peers` is not installed"),
]


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_folder):
    return load_pipeline(tiny_pipeline_folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def space(pipe):
    return search_space(trace(pipe), "uaq4")


@pytest.fixture(scope="module")
def shapes(space):
    return {layer: d.shape for d in space.decisions for layer in d.layers}


@pytest.fixture(scope="module")
def scored(pipe, shapes, tmp_path_factory):
    """The scores, the study that keeps them, and the denoiser's state before."""
    before = copy.deepcopy(pipe.denoiser.state_dict())
    study = Study(tmp_path_factory.mktemp("study"))
    found = modelopt.measure_scores(Lab(pipe, study=study), shapes, pipe.default_sampling(range(2), 2))
    return found, study, before


def test_every_layer_has_a_score_of_every_format_that_falls_with_the_bits(scored, shapes):
    found, _, _ = scored
    assert sorted(layer for group in found.groups for layer in group.layers) == sorted(shapes)
    for group in found.groups:
        is_matrix = len(shapes[group.layers[0]]) == 2
        assert list(group.scores) == [*(FORMATS if is_matrix else [f.name for f in PER_CHANNEL]), "fp16"]
        values = list(group.scores.values())
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1] == 0.0


def test_the_denoiser_is_left_as_it_was_and_scores_are_kept(scored, pipe, shapes):
    found, study, before = scored
    after = pipe.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with study.ledger() as used:
        again = modelopt.measure_scores(Lab(pipe, study=study), shapes, pipe.default_sampling(range(2), 2))
    assert isinstance(again, ModelOptScores)
    assert again == found
    (execution,) = used.parts.values()
    assert execution.n_calls == 2 + len(FORMATS) + 2  # recorded, once per format for its ranges, scored


def test_the_programme_keeps_its_own_budget_and_spends_it(scored, space):
    groups = grouped(space, scored[0])
    sizes = [sum(d.params for d in one) for one in modelopt.weights_of(space, groups)]
    for bits in (3.0, 4.5):
        chosen = modelopt.solve(space, groups, bits)
        used = sum(n * modelopt.EFFECTIVE_BITS[name] for n, name in zip(sizes, chosen, strict=True))
        assert 0.97 * bits <= used / sum(sizes) <= bits + FLOAT64_FORMULA
    assert modelopt.solve(space, groups, 1.0) is None


def test_weights_lie_on_the_grid_that_is_counted():
    """On each channel or block: at most 2^b values, whole multiples of one scale; and scales as many as counted."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 6), nn.Conv2d(6, 5, 3))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    cases = [("0", IntFormat(4, 128)), ("0", IntFormat(3)), ("1", IntFormat(2)), ("1", IntFormat(8))]
    for layer, number_format in cases:
        found = modelopt.quantized_weights(model, {layer: number_format.name, "nothing": "fp16"})
        assert list(found) == [layer]
        weight = found[layer].flatten(1)
        blocks = [b for row in weight for b in (row.split(number_format.block) if number_format.block else [row])]
        n_scales = (number_format.n_bytes(found[layer].shape) - -(-weight.numel() * number_format.bits // 8)) / 2
        assert len(blocks) == n_scales
        for block in blocks:
            values = block.unique()
            assert len(values) <= 2**number_format.bits
            steps = values.double() / values.double().diff().min()
            assert torch.allclose(steps, steps.round(), atol=ON_GRID)
        assert 0 < (weight - model.get_submodule(layer).weight.flatten(1)).norm() / weight.norm() < 0.6
