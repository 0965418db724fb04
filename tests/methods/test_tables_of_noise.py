"""Costs from records: error, jacobian, ablation, their agreement and their mean."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sedimo.allocation.combine import agreement, geometric_mean, predict
from sedimo.allocation.table import mean_cost
from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph, Node
from sedimo.lab.study import Setting
from sedimo.methods.ablation import (
    DIVERGED,
    ablation_table,
    check_scaling,
    mean_noise,
    plan_checks,
    plan_probes,
)
from sedimo.methods.error import error_table
from sedimo.methods.jacobian import jacobian_table
from sedimo.methods.taps import FirstOrder
from sedimo.metrics.signal import NoisePowers
from sedimo.quant.formats import FP16, Format, parse_formats
from sedimo.space import search_space
from tolerances import FLOAT64_FORMULA, FLOAT64_ROOT

FORMATS = parse_formats("uaq3,uaq4,uaq6,kmc3,kmc4,fp16")
NAMES = ("a", "b", "c", "d")
MACS = {"a": 100, "b": 300, "c": 500, "d": 100}
UAQ3, UAQ4, UAQ6, KMC3 = (Format.parse(t) for t in ("uaq3", "uaq4", "uaq6", "kmc3"))


def make_graph():
    nodes = tuple(Node(n, "layer", f"op_{n}", f"block_{n}", MACS[n], "Linear", (64, 64)) for n in NAMES)
    return DenoiserGraph("Toy", nodes, (), ())


def make_space():
    return search_space(make_graph(), FORMATS)


def relative_error(name, number_format):
    scale = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 1.0}[name] * (0.8 if number_format.family == "kmc" else 1.0)
    return 0.0 if not number_format.is_quantized else scale * 4.0 ** -(number_format.bits - 2)


def make_candidates(space, n=0, standard_error=0.0):
    return tuple(
        Candidate(
            d.name,
            f,
            relative_error(d.name, f),
            standard_error if f != FP16 else 0.0,
            n if f != FP16 else 0,
            d.paper_bytes(f),
            d.stored_bytes(f),
        )
        for d in space.decisions
        for f in d.formats
    )


SPACE = make_space()
CANDIDATES = make_candidates(SPACE)


def powers_of(*ratios):
    return NoisePowers(np.asarray(ratios, dtype=float), np.ones(len(ratios)))


def noise_of(choice, slope=1.0, constants=None):
    """A world in which r = sum of c * error^slope."""
    constants = constants or {"a": 1.0, "b": 10.0, "c": 0.1, "d": 3.0}
    return sum(constants[d] * relative_error(d, f) ** slope for d, f in choice.items())


def measure_all(probes, **world):
    noises = {probe: noise_of(dict([probe]), **world) for probe in probes}
    return {probe: powers_of(0.9 * noise, noise, 1.1 * noise) for probe, noise in noises.items()}


def test_error_costs_are_weighted_by_macs():
    table = error_table(SPACE, CANDIDATES)
    assert table.index["b", UAQ3].cost == pytest.approx(0.3 * relative_error("b", UAQ3))
    assert table.settings["weighting"] == "macs"
    noisy = error_table(SPACE, make_candidates(SPACE, n=8, standard_error=0.01))
    cost = noisy.index["b", UAQ3]
    assert (cost.cost, cost.standard_error, cost.n) == (
        pytest.approx(0.3 * relative_error("b", UAQ3)),
        pytest.approx(0.003),
        8,
    )
    assert (noisy.index["b", FP16].cost, noisy.index["b", FP16].n) == (0.0, 0)


def test_a_table_knows_all_that_allocation_needs():
    table = error_table(SPACE, CANDIDATES)
    assert table.unit == "relative weight error, weighted by share of work"
    assert set(table.index) == {(n, f) for n in NAMES for f in FORMATS}
    assert table.total_params == SPACE.params
    assert (table.operations["a"], table.blocks["a"], table.layers["a"]) == ("op_a", "block_a", ("a",))
    cost = table.index["c", KMC3]
    assert (cost.paper_bytes, cost.stored_bytes) == (64 * 64 * 3 // 8 + 8 * 2 * 64,) * 2
    assert cost.bops == 500 * 16 * 16
    assert table.index["c", UAQ3].bops == 500 * 3 * 16
    assert (table.attention_bops, table.full_bops) == (0, 256 * sum(d.macs for d in SPACE.decisions))


def probe_of(noise, unused=()):
    setting = Setting("w", "Toy", "step", (1, 2), 4, (), None, None, "float32", "cpu")
    return FirstOrder(setting, 4, noise, unused)


def test_jacobian_costs_are_means_over_samples_with_their_error():
    noise = {n: {str(f): (1.0 * f.bits, 3.0 * f.bits) for f in FORMATS if f != FP16} for n in NAMES}
    table = jacobian_table(SPACE, CANDIDATES, probe_of(noise, ("d",)))
    cost = table.index["a", UAQ3]
    assert (cost.cost, cost.n) == (6.0, 2)
    assert cost.standard_error == pytest.approx(stats.sem([3.0, 9.0]))
    assert table.index["a", FP16].cost == 0
    assert (table.settings["unused_decisions"], table.settings["row_weights"]) == ("d", "1.00")
    del noise["b"][str(UAQ6)]
    with pytest.raises(InputError, match="no b at uaq6"):
        jacobian_table(SPACE, CANDIDATES, probe_of(noise))


def test_probes_are_planned_near_the_bits_in_play():
    probes = plan_probes(SPACE, CANDIDATES, near_bits=(3.0, 6.0, 6.1))
    assert [d for d, _ in probes] == [n for n in NAMES for _ in range(3)]  # 6.0 and 6.1 mean the same formats
    assert [str(f) for _, f in probes[:3]] == ["uaq3", "uaq6", "kmc3"]  # of each family
    assert probes[0] == ("a", UAQ3)


def test_what_is_beaten_in_bytes_and_error_is_not_probed():
    worse = [c if c.format != UAQ4 else _with_error(c, 9.0) for c in CANDIDATES]
    planned = plan_probes(SPACE, worse, near_bits=(3.5, 4.5, 6.5))
    assert UAQ4 not in {f for _, f in planned}


def _with_error(candidate, error):
    return Candidate(candidate.decision, candidate.format, error, 0.0, 0, candidate.paper_bytes, candidate.stored_bytes)


@given(st.floats(0.5, 2.0))
def test_scaling_is_exact_between_probes_in_a_world_of_power_laws(slope):
    probes = plan_probes(SPACE, CANDIDATES, near_bits=(3.0, 6.5))
    table = ablation_table(SPACE, CANDIDATES, measure_all(probes, slope=slope))
    for name in NAMES:
        for number_format in (UAQ3, UAQ4, UAQ6):
            expected = noise_of({name: number_format}, slope=slope)
            assert table.index[name, number_format].cost == pytest.approx(expected, rel=FLOAT64_FORMULA)


def test_outside_the_probes_noise_is_proportional_to_error():
    probes = plan_probes(SPACE, CANDIDATES, near_bits=(4.5,))
    table = ablation_table(SPACE, CANDIDATES, measure_all(probes, slope=0.5))
    at_probe = table.index["a", UAQ4]
    assert (at_probe.cost, at_probe.n) == (pytest.approx(noise_of({"a": UAQ4}, slope=0.5)), 3)
    assert at_probe.standard_error == pytest.approx(at_probe.cost * 0.1 / math.sqrt(3))
    ratio = relative_error("a", UAQ3) / relative_error("a", UAQ4)
    assert table.index["a", UAQ3].cost == pytest.approx(at_probe.cost * ratio)
    assert table.index["a", UAQ6].cost == pytest.approx(at_probe.cost / 16)
    assert table.index["a", UAQ6].standard_error / table.index["a", UAQ6].cost == pytest.approx(0.1 / math.sqrt(3))
    assert table.index["a", FP16].cost == 0


def test_a_family_is_scaled_from_its_own_probes():
    found = {(n, f): powers_of(0.5 if f == KMC3 else 0.1) for n in NAMES for f in (UAQ4, KMC3)}
    table = ablation_table(SPACE, CANDIDATES, found)
    errors = {f: relative_error("a", f) for f in (UAQ3, UAQ4, KMC3)}
    assert errors[KMC3] < errors[UAQ3], "the nearer point is of another family"
    assert table.index["a", UAQ3].cost == pytest.approx(0.1 * errors[UAQ3] / errors[UAQ4])
    alone = ablation_table(SPACE, CANDIDATES, {probe: one for probe, one in found.items() if probe[1] == KMC3})
    assert alone.index["a", UAQ3].cost == pytest.approx(0.5 * errors[UAQ3] / errors[KMC3]), "better than nothing"


def test_a_probe_without_noise_says_that_the_decision_costs_nothing():
    probes = plan_probes(SPACE, CANDIDATES, near_bits=(4.5,))
    table = ablation_table(SPACE, CANDIDATES, dict.fromkeys(probes, powers_of(0.0, 0.0)))
    assert {c.cost for c in table.costs} == {0.0}


def test_unprobed_decisions_are_refused():
    probes = plan_probes(SPACE, CANDIDATES)
    with pytest.raises(InputError, match="d was not probed"):
        ablation_table(SPACE, CANDIDATES, measure_all([probe for probe in probes if probe[0] != "d"]))


def test_scaling_is_checked_on_pairs_that_were_not_probed():
    probes = plan_probes(SPACE, CANDIDATES, near_bits=(4.5,))
    checks = plan_checks(CANDIDATES, probes, n=6)
    assert checks == plan_checks(CANDIDATES, probes, n=6)
    assert len(set(checks)) == 6
    assert not set(probes).intersection(checks)
    assert len(plan_checks(CANDIDATES, probes, n=999)) == 4 * 5 - 4 * 2
    table = ablation_table(SPACE, CANDIDATES, measure_all(probes))
    good = check_scaling(table, measure_all(checks))
    assert good.n == 6
    assert (good.slope, good.ratio, good.srcc) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    bent = check_scaling(table, measure_all(checks, constants=dict.fromkeys(NAMES, 2.0)))
    assert bent.srcc < 1


def test_means_over_samples():
    assert mean_noise(powers_of(0.1, 0.4)).value == pytest.approx(0.25)
    assert mean_noise(powers_of(math.inf, 0.4)).value == pytest.approx((DIVERGED + 0.4) / 2)
    assert math.isnan(mean_cost([2.0]).standard_error), "one sample says nothing of the spread"


def test_agreement_finds_slope_ratio_and_rank():
    x = [0.1, 0.2, 0.5, 1.0]
    found = agreement(x, [3 * v**2 for v in x])
    assert (found.n, found.slope, found.srcc) == (4, pytest.approx(2), pytest.approx(1))
    assert found.slope_standard_error == pytest.approx(0, abs=FLOAT64_ROOT)
    assert found.ratio == pytest.approx(math.exp(np.mean(np.log([3 * v for v in x]))))
    assert agreement(x, x[::-1]).srcc == pytest.approx(-1)
    flat = agreement([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert math.isnan(flat.slope)
    assert math.isnan(flat.srcc)
    for wrong in (([1.0], [1.0]), ([1.0, 2.0, 0.0], [1.0] * 3), ([1.0] * 3, [1.0] * 4)):
        with pytest.raises(InputError):
            agreement(*wrong)


def test_a_recipe_is_predicted_by_the_sum_of_its_costs():
    table = error_table(SPACE, CANDIDATES)
    choice = {"a": UAQ3, "b": UAQ6, "c": FP16, "d": FP16}
    assert predict(table, choice) == pytest.approx(table.index["a", UAQ3].cost + table.index["b", UAQ6].cost)
    assert predict(table, dict.fromkeys(NAMES, FP16)) == 0
    with pytest.raises(InputError, match="no cost for a at kma2"):
        predict(table, {"a": Format("kma", 2)})


def test_the_geometric_mean_of_two_tables():
    first = error_table(SPACE, CANDIDATES)
    second = ablation_table(SPACE, CANDIDATES, measure_all(plan_probes(SPACE, CANDIDATES)))
    mean = geometric_mean(first, second)
    same = geometric_mean(first, first)
    assert mean.method == "error+ablation"
    assert {k: v for k, v in mean.settings.items() if k.startswith("error.")} == {"error.weighting": "macs"}
    for key, cost in same.index.items():
        assert cost.cost == pytest.approx(first.index[key].cost)
    # b is ten times as sensitive as a in the second table alone, where macs do not count: the mean gives the root
    share = SPACE.decision_index["b"].macs / SPACE.decision_index["a"].macs
    factor = (mean.index["b", UAQ3].cost / first.index["b", UAQ3].cost) / (
        mean.index["a", UAQ3].cost / first.index["a", UAQ3].cost
    )
    assert factor == pytest.approx(math.sqrt(10 / share))
    assert math.prod(mean.index[k].cost / c.cost for k, c in first.index.items() if c.cost) == pytest.approx(1)
    other = error_table(SPACE, [c for c in CANDIDATES if c.format != UAQ6])
    with pytest.raises(InputError, match="different choices"):
        geometric_mean(first, other)


@pytest.mark.parametrize("other", [0.0, 1.0])
def test_what_one_table_forbids_stays_forbidden_in_the_geometric_mean(other):
    plain = error_table(SPACE, CANDIDATES)
    key, *rest = plain.index
    costs = [replace(c, cost=math.inf if k == key else c.cost) for k, c in plain.index.items()]
    beside = [replace(c, cost=other if k == key else c.cost) for k, c in plain.index.items()]
    tables = replace(plain, costs=tuple(costs)), replace(plain, costs=tuple(beside))
    for mean in (geometric_mean(*tables), geometric_mean(*tables[::-1])):
        assert mean.index[key].cost == math.inf
        assert [mean.index[k].cost for k in rest] == pytest.approx([plain.index[k].cost for k in rest])
