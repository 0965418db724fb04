"""Folds, early stopping, scores and costs on a planted denoiser."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import IMPORTANCE, candidates_of, planted_graph, planted_set, quality_of, random_codes, true_costs
from scipy import stats

from sedimo.allocation.solve import allocate, allocate_within, read_budget
from sedimo.errors import InputError
from sedimo.methods.predictor.features import disjoint_groups, picked
from sedimo.methods.predictor.quality import predict_by_rivals
from sedimo.methods.predictor.scoring import (
    calibrate,
    group_scores,
    hop_moments,
    most_common,
    noise_of_variants,
    noise_table,
    option_scores,
    score_table,
    variants_of,
)
from sedimo.methods.predictor.training import FAST, PAPER, TrainingOptions, relevance, train_predictor
from sedimo.quant.formats import Format
from tolerances import FLOAT32_NETWORK, FLOAT32_SUM

QUICK = replace(FAST, n_epochs=6, patience=3, n_folds=3)
QUICK_PAPER = replace(PAPER, n_epochs=25, patience=25, n_folds=3, n_hops=2, batch_size=32)


@pytest.fixture(scope="module")
def data():
    return planted_set(90)


@pytest.fixture(scope="module")
def fast(data):
    return train_predictor(data, QUICK)


@pytest.fixture(scope="module")
def paper(data):
    return train_predictor(data, QUICK_PAPER)


def test_every_recipe_is_tested_once_and_well(data, fast):
    tested = np.sort(np.concatenate([fold.test for fold in fast.folds]))
    assert (tested == np.arange(data.n)).all()
    held_out = fast.cross_validated()
    assert stats.spearmanr(held_out, data.quality).statistic > 0.93
    new = random_codes(data.choices, 100, seed=77)
    assert stats.spearmanr(fast.predict(new), quality_of(data.choices, new)).statistic > 0.95


def test_a_test_fold_has_no_say_in_its_training(data, fast):
    """Whatever was measured for the test recipes, the network that is tested on them is the same."""
    test = fast.folds[0].test
    quality, target = data.quality.copy(), data.target.copy()
    quality[test], target[test] = -100 - np.arange(len(test)), 7.0 + np.arange(len(test))
    again = train_predictor(replace(data, quality=quality, target=target), QUICK)
    assert np.array_equal(again.folds[0].predicted, fast.folds[0].predicted)
    assert not np.array_equal(again.folds[1].predicted, fast.folds[1].predicted)


def test_the_same_seed_gives_the_same_predictor(data, fast):
    again = train_predictor(data, QUICK)
    assert all(np.array_equal(a.predicted, b.predicted) for a, b in zip(again.folds, fast.folds, strict=True))
    other = train_predictor(data, replace(QUICK, seed=1))
    assert not np.array_equal(other.folds[0].test, fast.folds[0].test)


def test_the_published_preset_learns_the_order(data, paper):
    assert not paper.noise_networks
    assert np.mean([fold.hop_srcc for fold in paper.folds]) > 0.3  # a few epochs of ten thousand
    assert -50 < paper.cross_validated().mean() < 100  # relevances are 0 to 50


def test_relevance_is_that_of_the_released_code():
    reference = np.arange(101.0)
    assert relevance(np.array([0.0, 20.0, 60.0, 100.0, 200.0]), reference).tolist() == [0, 0, 25, 50, 50]


def test_too_little_is_refused(data):
    few = replace(data, codes=data.codes[:5], quality=data.quality[:5], target=data.target[:5])
    with pytest.raises(InputError, match="at least 20 measured recipes, got 5"):
        train_predictor(few)
    with pytest.raises(InputError, match="preset must be one of fast, paper"):
        TrainingOptions(preset="best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least two folds"):
        replace(FAST, n_folds=1)


def test_scores_of_options_follow_what_was_planted(data, fast):
    each, exists = option_scores(fast, hop_moments(fast)), data.choices.exists
    scores = each.mean(axis=0)
    assert np.isnan(scores[~exists]).all()
    assert stats.spearmanr(scores[exists], -np.log(true_costs(data.choices)[exists])).statistic > 0.8
    assert np.isfinite(each[:, exists]).all()


def test_a_hop_worse_than_chance_has_no_weight(data, fast):
    moments = hop_moments(fast)
    bad = replace(fast, folds=tuple(replace(f, hop_srcc=np.full_like(f.hop_srcc, -0.5)) for f in fast.folds))
    scores = option_scores(bad, moments).mean(axis=0)
    assert (scores[data.choices.exists] == 0).all()


def test_what_costs_nothing_has_the_highest_score():
    free = planted_set(60, formats="uaq3,kmc4,fp16")
    prior = np.where(free.choices.array(lambda _d, f: float(f.is_quantized)) > 0, free.prior, 0.0)
    codes = free.codes[(picked(prior, free.codes) > 0).any(axis=1)]
    quality = -10 * np.log10(picked(prior, codes).sum(axis=1) + 1e-3)
    data = replace(free, prior=prior, codes=codes, quality=quality, target=quality)
    predictor = train_predictor(data, QUICK)
    moments = hop_moments(predictor)
    each = option_scores(predictor, moments)
    assert np.isfinite(each).all()
    scores = each.mean(axis=0)
    fp16 = [str(f) for f in data.choices.space.decisions[0].formats].index("fp16")
    assert (scores.argmax(axis=1) == fp16).all()
    graph = planted_graph()
    assert np.isfinite(group_scores(predictor, graph.groups[0], moments)).all()


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_a_part_of_the_graph_gives_what_the_whole_gives(data, fast, paper, preset):
    """Scores in context from the upstream part alone equal those of the whole graph with all variants put in."""
    predictor, graph = {"fast": fast, "paper": paper}[preset], planted_graph()
    group = graph.groups[1]
    moments = hop_moments(predictor)
    reference = most_common(data)
    found = group_scores(predictor, group, moments, reference=reference).mean(axis=0)
    decisions, choice = variants_of(data, group)
    assert len(choice) == len(found) == 4**3
    codes = np.repeat(reference[None], len(choice), axis=0)
    codes[:, decisions] = choice
    hop = min(group.hop, predictor.options.n_hops)
    places = [n.name for n in graph.nodes]
    nodes = [places.index(name) for name in group.layers]
    each = []
    rows = torch.from_numpy(data.features.rows(codes))
    for fold, (mean, deviation) in zip(predictor.folds, moments[:, hop], strict=True):
        with torch.no_grad():
            h = fold.network.eval().hops(rows)[hop]
            if preset == "paper":
                raw = h[:, places.index(group.root)].abs().sum(dim=1).numpy()
            else:
                parts = fold.network.log_contributions(rows[:, nodes], h[:, nodes], hop)
                raw = -parts.exp().sum(dim=1).log().numpy()
        each.append((raw - mean) / deviation * max(fold.hop_srcc[hop], 0))
    assert np.allclose(found, np.mean(each, axis=0), atol=FLOAT32_NETWORK)
    if preset == "paper":
        return  # two hops upstream of the root there is nothing but the group
    alone = group_scores(predictor, group, moments).mean(axis=0)
    assert not np.allclose(alone, found, atol=FLOAT32_NETWORK)


def test_the_best_variant_is_the_planted_one(data, fast):
    graph = planted_graph()
    found = group_scores(fast, graph.groups[0], hop_moments(fast))
    decisions, choice = variants_of(data, graph.groups[0])
    best = choice[found.mean(axis=0).argmax()]
    formats = [data.choices.space.decisions[d].formats[k] for d, k in zip(decisions, best, strict=True)]
    assert formats == [Format("kmc", 4)] * 3


def test_costs_sum_to_the_noise_that_is_predicted(data, fast):
    reference = data.codes[data.quality.argmax()]
    table = noise_table(fast, candidates_of(data.choices), reference)
    choice = data.choices.choice(reference)
    total = sum(table.index[key].cost for key in choice.items())
    assert 10 * np.log10(1 / total) == pytest.approx(fast.predict(reference[None])[0], abs=FLOAT32_SUM)
    planted = true_costs(data.choices)
    mine = data.choices.costs(table)
    assert stats.spearmanr(mine[data.choices.exists], planted[data.choices.exists]).statistic > 0.85
    careful = data.choices.costs(noise_table(fast, candidates_of(data.choices), reference, confidence=1.0))
    assert (careful[data.choices.exists] > mine[data.choices.exists]).all()


def test_scores_are_calibrated_without_the_term_for_bits(data, paper):
    scores, bits = np.arange(50.0), np.tile([3.0, 4.0], 25)
    found = calibrate(scores, bits, 2.0 + 0.5 * scores - 7.0 * bits)
    assert (found.offset, found.slope, found.per_bit) == pytest.approx((2.0, 0.5, -7.0))
    assert found.r2 == pytest.approx(1.0)
    options = option_scores(paper, hop_moments(paper))
    total = picked(np.nan_to_num(options.mean(axis=0)), data.codes).sum(axis=1)
    table = score_table(
        data.choices,
        candidates_of(data.choices),
        options,
        calibrate(total, data.choices.paper_bits(data.codes), data.quality),
    )
    assert min(c.cost for c in table.costs) == 0
    with pytest.raises(InputError, match="scores, not noise"):
        noise_table(paper, candidates_of(data.choices), data.codes[0])


def test_a_group_adds_what_its_layers_add_in_the_whole_network(data, fast, paper):
    graph, reference = planted_graph(), most_common(data)
    costs = noise_table(fast, candidates_of(data.choices), reference)
    decisions, choice = variants_of(data, graph.groups[1])
    row = np.flatnonzero((choice == reference[decisions]).all(axis=1))[0]
    variants = noise_of_variants(fast, graph.groups, reference, costs)
    whole = []
    rows = torch.from_numpy(data.features.rows(reference[None]))
    for fold in fast.folds:
        with torch.no_grad():
            network = fold.network.eval()
            contributions = network.contributions(rows, network.hops(rows)[-1], 2)
        whole.append(float(contributions[0, decisions].sum()))
    assert variants[1].cost[row] == pytest.approx(np.mean(whole), rel=FLOAT32_NETWORK)
    with pytest.raises(InputError, match="scores, not noise"):
        noise_of_variants(paper, graph.groups, reference, costs)


def test_layers_that_are_varied_already_leave_their_group(data):
    graph = planted_graph()
    overlapping = replace(graph.groups[1], name="again", layers=("blocks.0.query", *graph.groups[1].layers))
    found = disjoint_groups(data.choices.space, [graph.groups[0], overlapping, graph.groups[0]])
    assert [g.name for g in found] == ["blocks.0.attention", "again"]
    assert found[1].layers == graph.groups[1].layers


def test_groups_are_allocated_by_their_noise(data, fast):
    graph, reference = planted_graph(), most_common(data)
    table = noise_table(fast, candidates_of(data.choices), reference)
    known = (fast, graph.groups, reference, table)
    plain, careful = (noise_of_variants(*known, confidence=c) for c in (0.0, 1.0))
    assert all((b.cost > a.cost).all() for a, b in zip(plain, careful, strict=True))
    single = allocate(table, bits=4.5)
    grouped = allocate_within(table, read_budget(table.total_params, bits=4.5), groups=plain)
    assert grouped.paper_bits <= 4.5
    codes = data.choices.codes([single.recipe, grouped.recipe])
    truth = quality_of(data.choices, codes)
    assert abs(truth[0] - truth[1]) < 1.0  # of a planted model whose costs add, both find what is best


def test_rivals_see_the_same_folds(data, fast):
    costs = {"planted": true_costs(data.choices)}
    new = random_codes(data.choices, 60, seed=5)
    tests = [fold.test for fold in fast.folds]
    rivals = predict_by_rivals(data, new, tests=tests, costs=costs, errors=data.prior)
    truth = quality_of(data.choices, new)
    srcc = {name: stats.spearmanr(said[data.n :], truth).statistic for name, said in rivals.items()}
    assert srcc["planted costs, summed"] == pytest.approx(1.0)
    assert srcc["average bits"] < srcc["noise model, no graph"]
    assert srcc["weight error, summed"] < srcc["noise model, no graph"]
    assert srcc["ridge on one-hot choices"] > 0.7
    assert not any(np.isnan(said).any() for said in rivals.values())
    assert set(IMPORTANCE) == {d.operation for d in data.choices.space.decisions}
