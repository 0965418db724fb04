"""Peers of a comparison: bytes, budgets, groups and notes, with ModelOpt itself replaced at its boundary."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sedimo.allocation.budget import BopsLimit
from sedimo.errors import MissingExtraError
from sedimo.jobs.compare import CompareSettings, compare_methods, comparison_page
from sedimo.jobs.settings import FormatSettings
from sedimo.lab.bench import SourceSettings, trace
from sedimo.lab.seeds import SamplingSettings
from sedimo.methods import METHODS, method_named, modelopt
from sedimo.methods.modelopt import (
    FORMATS,
    GroupScores,
    ModelOptScores,
    PeerRecipe,
    grouped,
    nearest_below,
    peer_recipe,
    wanted_methods,
)
from sedimo.reporting.html import render
from sedimo.space import Recipe, search_space
from tolerances import FLOAT64_SUM

PEERS = tuple(m.name for m in METHODS if m.is_peer)


@pytest.fixture(scope="module")
def space(tiny_dit):
    return search_space(trace(tiny_dit), "uaq4")


def scores_of(shapes):
    """Scores that fall with the bits and differ between layers."""
    names = [*FORMATS, "fp16"]
    bits = [f.effective_bits for f in FORMATS.values()] + [16.0]
    groups = [
        GroupScores((layer,), {n: (1 + i % 5) * 4.0**-b for n, b in zip(names, bits, strict=True)})
        for i, layer in enumerate(shapes)
    ]
    return ModelOptScores(tuple(groups))


def shapes_of(space):
    return {layer: d.shape for d in space.decisions for layer in d.layers}


def sizes_of(space, groups):
    """Weights, those of equal layers once."""
    return [sum(d.params for d in one) for one in modelopt.weights_of(space, groups)]


def greedy(space, groups, effective_bits):
    """Stands for ModelOpt's programme: raises the bits of the group that gains most, within its own count."""
    names = [list(g.scores) for g in groups]
    at, sizes = [0] * len(groups), sizes_of(space, groups)

    def used():
        return sum(size * modelopt.EFFECTIVE_BITS[n[i]] for size, n, i in zip(sizes, names, at, strict=True))

    for _ in range(sum(map(len, names))):
        steps = [i for i, n in enumerate(names) if at[i] + 1 < len(n)]
        steps.sort(key=lambda i: groups[i].scores[names[i][at[i] + 1]] - groups[i].scores[names[i][at[i]]])
        for i in steps:
            at[i] += 1
            if used() <= effective_bits * sum(sizes):
                break
            at[i] -= 1
        else:
            break
    return tuple(n[i] for n, i in zip(names, at, strict=True)) if used() <= effective_bits * sum(sizes) else None


@pytest.fixture
def fake(monkeypatch):
    """ModelOpt's boundary, replaced; counts how often it is asked."""
    asked = {"scores": 0, "weights": 0}

    def scores(_lab, shapes, _on):
        asked["scores"] += 1
        return scores_of(shapes)

    def weights(denoiser, formats):
        asked["weights"] += 1
        found = {}
        for layer, name in formats.items():
            if name != "fp16":
                weight, most = denoiser.get_submodule(layer).weight.detach(), 2 ** (FORMATS[name].bits - 1) - 1
                scale = weight.abs().max() / most
                found[layer] = (weight / scale).round() * scale
        return found

    monkeypatch.setattr(modelopt, "_module", lambda _name: None)
    monkeypatch.setattr(modelopt, "is_installed", lambda: True)
    monkeypatch.setattr(modelopt, "identity", lambda: {"modelopt": "fake"})
    monkeypatch.setattr(modelopt, "measure_scores", scores)
    monkeypatch.setattr(modelopt, "solve", greedy)
    monkeypatch.setattr(modelopt, "quantized_weights", weights)
    return asked


def order_in(folder, source, **changed):
    sampling = SamplingSettings(n_seeds=2, n_steps=1)
    order = CompareSettings(
        SourceSettings(str(source)),
        (5.0, 6.0),
        folder,
        methods="jacobian,modelopt",
        n_fresh=4,
        formats=FormatSettings("uaq2,uaq4,uaq6"),
        sampling=sampling,
    )
    return replace(order, **changed)


def brute_force_bytes(space, formats):
    """Bytes weight by weight and scale by scale: equal layers of one format once, codes packed."""
    total = 0
    for decision in space.decisions:
        (name,) = {formats[layer] for layer in decision.layers}
        if name == "fp16":
            total += 2 * len(list(itertools.product(*map(range, decision.shape))))
            continue
        number_format = FORMATS[name]
        rows = list(range(decision.shape[0]))
        n_codes = len(rows) * math.prod(decision.shape[1:])
        starts = range(0, decision.shape[1], number_format.block) if number_format.block else (0,)
        total += -(-n_codes * number_format.bits // 8) + 2 * len([0 for _ in rows for _ in starts])
    return total


def test_bytes_are_those_of_codes_and_scales_of_every_layer_once(space):
    assert any(len(d.layers) > 1 for d in space.decisions)
    groups = grouped(space, scores_of(shapes_of(space)))
    assert len(groups) == len(space.decisions)
    generator = np.random.default_rng(0)
    for _ in range(20):
        chosen = [str(generator.choice(list(g.scores))) for g in groups]
        recipe = peer_recipe(space, groups, chosen)
        assert recipe.paper_bits * space.params / 8 == pytest.approx(
            brute_force_bytes(space, recipe.formats), rel=FLOAT64_SUM
        )
    all_fp16 = peer_recipe(space, groups, ["fp16"] * len(groups))
    assert all_fp16.paper_bits == 16
    assert all_fp16.bops == space.full_bops
    assert peer_recipe(space, groups, ["int4"] * len(groups)).bops == space.bops(space.uniform(uaq4(space)))


def test_a_peer_decides_on_layers_whose_streams_are_decisions_as_a_whole(tiny_dit, space):
    graph = trace(tiny_dit)
    cut = next(d.name for d in space.decisions if len(d.layers) == 1 and d.shape[1] > 3)
    nodes = [replace(n, streams=(3, n.shape[1] - 3)) if n.name == cut else n for n in graph.nodes]
    split = search_space(replace(graph, nodes=tuple(nodes)), "uaq4,fp16")
    assert len(split.decisions) == len(space.decisions) + 1
    scores = scores_of(shapes_of(space))
    groups, whole = grouped(split, scores), grouped(space, scores)
    assert sizes_of(split, groups) == sizes_of(space, whole)
    for name in ("fp16", "int3"):
        chosen = [name] * len(groups)
        assert peer_recipe(split, groups, chosen) == peer_recipe(space, whole, chosen)


def uaq4(space):
    return next(f for f in space.common_formats if str(f) == "uaq4")


def test_layers_of_one_weight_are_scored_together_and_groups_that_share_one_are_merged(space):
    shared = next(d for d in space.decisions if len(d.layers) > 1)
    alone = next(d for d in space.decisions if len(d.layers) == 1)
    first, second = shared.layers[:2]
    scores = ModelOptScores(
        (
            GroupScores((first,), {"int4": 1.0, "int4b128": 0.5, "fp16": 0.0}),
            GroupScores((second, alone.name), {"int4": 2.0, "fp16": 0.0}),
        )
    )
    (group,) = grouped(space, scores, factor=10.0)
    assert set(modelopt.weights_of(space, [group])[0]) == {shared, alone}
    assert group.scores == {"int4": 30.0, "fp16": 0.0}
    assert sizes_of(space, [group])[0] == shared.params + alone.params


@pytest.mark.parametrize("budget", [2.6, 3.0, 3.5, 4.0, 7.3])
def test_bisection_comes_near_the_budget_and_never_above(space, budget):
    groups = grouped(space, scores_of(shapes_of(space)))
    seen = []

    def solve(bits):
        found = peer_recipe(space, groups, greedy(space, groups, bits))
        seen.append(found)
        return found

    found = nearest_below(budget, solve)
    assert found.paper_bits <= budget
    assert found.paper_bits == max(r.paper_bits for r in seen if r is not None and r.paper_bits <= budget)
    assert found.paper_bits > 0.9 * budget


def test_bisection_holds_the_budget_where_sizes_jump_and_fall():
    generator = np.random.default_rng(1)
    for _ in range(200):
        budget = generator.uniform(2.0, 16.0)
        sizes = {}

        def solve(bits, sizes=sizes):
            sizes[bits] = bits + generator.normal(0, 1.0)
            return None if generator.random() < 0.1 else PeerRecipe({}, sizes[bits], 0)

        found = nearest_below(budget, solve)
        assert found is None or found.paper_bits <= budget
    assert nearest_below(1.0, lambda bits: PeerRecipe({}, bits, 0)) is None
    assert nearest_below(3.0, lambda _bits: None) is None


def test_a_peer_that_is_not_installed_is_left_out_of_all_and_refused_by_name(monkeypatch):
    monkeypatch.setattr(modelopt, "find_spec", lambda _name: None)

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(modelopt, "import_module", missing)
    methods, notes = wanted_methods(METHODS, everything=METHODS)
    assert [m.name for m in methods] == [m.name for m in METHODS if m.name not in PEERS]
    assert "pip install 'sedimo[peers]'" in notes[0]
    assert all(name in notes[0] for name in PEERS)
    error, jacobian, asked = (method_named(name)[0] for name in ("error", "jacobian", "modelopt"))
    assert wanted_methods([error], everything=METHODS) == ((error,), ())
    with pytest.raises(MissingExtraError, match=r"nvidia-modelopt.*pip install 'sedimo\[peers\]'"):
        wanted_methods([asked, jacobian], everything=METHODS)


def test_a_peer_is_measured_at_equal_bytes_on_the_same_seeds(fake, tiny_pipeline_folder, tmp_path):
    found = compare_methods(order_in(tmp_path, tiny_pipeline_folder, methods=",".join(("jacobian", *PEERS))))
    assert [(r.method, r.bits) for r in found.rows] == [(m, b) for b in (5.0, 6.0) for m in ("jacobian", *PEERS)]
    for row in (r for r in found.rows if r.method in PEERS):
        assert row.recipe is None
        assert set(row.formats.values()) <= {*FORMATS, "fp16"}
        assert row.paper_bits == row.stored_bits <= row.bits
        assert row.sqnr_db.n == row.ahead.n == 4
    assert all(isinstance(r.recipe, Recipe) and not r.formats for r in found.rows if r.method == "jacobian")
    assert found.n_comparisons == 4
    assert fake["weights"] == 2  # both peers chose alike here: scores that differ by a factor alone
    again = compare_methods(order_in(tmp_path, tiny_pipeline_folder, methods=",".join(("jacobian", *PEERS))))
    assert again == found
    assert fake["weights"] == 2  # kept in the study
    page = render(comparison_page(found))
    assert "in formats of its own" in page
    assert '<td class="left">modelopt (peer)</td>' in page


def test_the_noise_of_a_peer_is_that_of_its_weights(fake, tiny_pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(modelopt, "quantized_weights", lambda _denoiser, _formats: {})
    found = compare_methods(order_in(tmp_path, tiny_pipeline_folder))
    exact = [r.sqnr_db.value for r in found.rows if r.method == "modelopt"]
    assert all(math.isinf(value) for value in exact)  # nothing exchanged: no noise at all


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"bops": BopsLimit.parse("90%")}, "no budget of bit operations"),
        ({"formats": FormatSettings("uaq2,uaq4,uaq6", ends="fp16")}, "first and last layers"),
        ({"formats": FormatSettings("uaq4a8,uaq6a8")}, "weights alone"),
    ],
)
def test_a_peer_that_cannot_keep_an_order_is_left_out_with_the_reason(
    fake, tiny_pipeline_folder, tmp_path, changed, reason
):
    found = compare_methods(order_in(tmp_path, tiny_pipeline_folder, bits=(9.0,), **changed))
    assert [r.method for r in found.rows] == ["jacobian"]
    assert reason in found.notes[0]
    assert fake["scores"] == 0


def test_what_a_peer_leaves_unused_is_told(fake, tiny_pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(modelopt, "solve", lambda _space, groups, _bits: ("int4",) * len(groups))
    found = compare_methods(order_in(tmp_path, tiny_pipeline_folder))
    rows = [r for r in found.rows if r.method == "modelopt"]
    assert not any(r.is_full for r in rows)
    assert all("leaves" in note and "of the budget unused" in note for note in found.notes)
    monkeypatch.setattr(modelopt, "solve", lambda _space, groups, _bits: ("int8",) * len(groups))
    found = compare_methods(order_in(tmp_path, tiny_pipeline_folder))
    assert "modelopt at 5 bits: left out: its linear programme finds no recipe" in found.notes[0]
    assert torch.is_grad_enabled()
