"""From matrices of orthogonality to importances and costs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tables_of_noise import NAMES, make_graph, make_space, relative_error

from sedimo.allocation.budget import BudgetSettings
from sedimo.allocation.solve import allocate
from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.lab.study import Setting
from sedimo.methods import method_named
from sedimo.methods.error import error_table
from sedimo.methods.method import Task
from sedimo.methods.orthogonality import (
    MAX_WASTE,
    ImportanceOptions,
    OrthogonalityPart,
    OrthogonalityProbe,
    converged,
    importance,
    importance_error,
    importance_per_step,
    orthogonality_table,
)
from sedimo.quant.formats import FP16, Format, parse_formats, with_activations
from sedimo.space import search_space
from tolerances import FLOAT64_FORMULA, FLOAT64_SUM

SETTING = Setting("0" * 64, "toy", "step", tuple(range(8)), 4, (), None, None, "float32", "cpu")


def part_of(matrix, constant=(), timestep=500.0, **unknown):
    n = len(matrix)
    sums = np.asarray(matrix).sum(axis=1) - 1
    replicates = tuple(tuple((sums * f).tolist()) for f in (0.9, 1.0, 1.1, 1.0))
    upper = np.asarray(matrix, dtype=float)[np.triu_indices(n, 1)]
    return OrthogonalityPart(timestep, tuple(upper.tolist()), replicates, constant, **unknown)


def matrix_of(*entries):
    found = np.eye(4)
    found[np.triu_indices(4, 1)] = entries
    return found + found.T - np.eye(4)


ALIKE = matrix_of(0.9, 0.9, 0.1, 0.9, 0.1, 0.1)  # a, b and c repeat each other, d does not
EARLY, LATE = matrix_of(0.9, 0.9, 0.9, 0.1, 0.1, 0.1), matrix_of(0.1, 0.1, 0.9, 0.1, 0.9, 0.9)


def probe_of(*parts):
    return OrthogonalityProbe(SETTING, NAMES, parts)


def candidates_of(space):
    return [
        Candidate(d.name, f, relative_error(d.name, f), 0.0, 0, d.paper_bytes(f), d.stored_bytes(f))
        for d in space.decisions
        for f in d.formats
    ]


def table_of(probe, options=None):
    space = make_space()
    return orthogonality_table(space, candidates_of(space), probe, options or ImportanceOptions())


def test_layers_that_repeat_others_least_are_most_important():
    probe = probe_of(part_of(ALIKE))
    theta, errors = importance(probe), importance_error(probe, ImportanceOptions())
    gamma = (ALIKE.sum(axis=1) - 1) / 3
    assert theta == pytest.approx(np.exp(-10 * (gamma - gamma.min())))
    assert theta.argmax() == 3
    assert (errors[:3] > 0).all()
    assert errors[3] == 0  # the largest is the unit


def test_a_huge_beta_leaves_numbers():
    found = importance(probe_of(part_of(ALIKE)), ImportanceOptions(beta=1e6))
    assert found.tolist() == [0, 0, 0, 1]


def test_importances_of_single_steps_are_shares_of_the_largest():
    """A report draws their logarithms: whatever beta is, the largest has one; an unknown layer must not count."""
    unknown = matrix_of(0.9, 0.8, 0.0, 0.9, 0.0, 0.0)
    for beta in (1.0, 1e5):
        probe, options = probe_of(part_of(ALIKE), part_of(unknown, constant=("d",))), ImportanceOptions(beta=beta)
        found = importance_per_step(probe, options)
        assert np.nanmax(found) == found[0, 3] == 1
        gamma = (ALIKE.sum(axis=1) - 1) / 3
        assert found[0] == pytest.approx(np.exp(-beta * (gamma - gamma.min())))
        assert np.isnan(found[1]).tolist() == [False, False, False, True]
        assert np.isfinite(importance(probe, options)).all()


@pytest.mark.parametrize("tau", [1e5, -1e5, 1e300])
def test_a_huge_beta_beside_a_huge_tau_ranks_by_the_timesteps_that_count(tau):
    """The least repetition may be where the weight is too small for a number."""
    other = matrix_of(0.2, 0.7, 0.8, 0.6, 0.7, 0.9)
    parts = (part_of(other), part_of(ALIKE))
    probe, options = probe_of(*(parts if tau > 0 else parts[::-1])), ImportanceOptions(beta=1e4, tau=tau)
    # b repeats others least in `other`
    assert importance(probe, options) == pytest.approx([0, 1, 0, 0], abs=FLOAT64_SUM)
    assert np.isfinite(importance_error(probe, options)).all()


def test_a_layer_seen_at_steps_of_little_weight_alone_is_as_important_as_there():
    lone = part_of(matrix_of(0.0, 0.0, 0.0, 0.5, 0.5, 0.5), constant=("a",))
    all_seen = part_of(matrix_of(*[0.5] * 6))
    found = importance(probe_of(lone, all_seen), ImportanceOptions(tau=1e4))
    assert found == pytest.approx([1, 1, 1, 1])


def test_beta_zero_makes_all_alike():
    assert importance(probe_of(part_of(ALIKE)), ImportanceOptions(beta=0)).tolist() == [1, 1, 1, 1]


def test_tau_turns_the_view_to_early_or_late_timesteps():
    probe = probe_of(part_of(EARLY), part_of(LATE))
    early, late = (importance(probe, ImportanceOptions(tau=tau)) for tau in (20.0, -20.0))
    assert early == pytest.approx(importance(probe_of(part_of(EARLY))))
    assert late == pytest.approx(importance(probe_of(part_of(LATE))))
    found = importance(probe, ImportanceOptions(beta=1.0, tau=1.0))
    gammas = [(matrix.sum(axis=1) - 1) / 3 for matrix in (EARLY, LATE)]
    expected = math.e * np.exp(-gammas[0]) + np.exp(-gammas[1])
    assert found == pytest.approx(expected / expected.max())


def test_the_published_programme_takes_the_mean_of_what_comes_after():
    theta = importance(probe_of(part_of(ALIKE)), ImportanceOptions(beta=1.0))
    tail = importance(probe_of(part_of(ALIKE)), ImportanceOptions(beta=1.0, tail_mean=True))
    means = np.array([theta[i:].mean() for i in range(4)])
    assert tail == pytest.approx(means / means.max())


def test_layers_that_nothing_is_known_of_count_as_the_mean():
    matrix = matrix_of(0.9, 0.1, 0.0, 0.1, 0.0, 0.0)
    probe, options = probe_of(part_of(matrix, constant=("d",))), ImportanceOptions(beta=1.0)
    assert probe.never_known()["constant"] == ("d",)
    alone = np.exp(-np.array([0.5, 0.5, 0.1]))  # mean over the two others that are known
    assert importance(probe, options) == pytest.approx(np.array([*alone, alone.mean()]) / alone.max())
    assert math.isnan(importance_per_step(probe, options)[0, 3])
    with pytest.raises(InputError, match="at no timestep two of them differ"):
        importance(probe_of(part_of(matrix, constant=("b", "c", "d"))))


def test_layers_that_are_never_called_cost_nothing_and_unread_ones_count_as_the_mean():
    matrix = matrix_of(0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
    table = table_of(probe_of(part_of(matrix, unused=("c",), unread=("d",))))
    assert all(cost.cost == 0 for cost in table.by_decision["c"])
    costs = {name: [c.cost for c in table.by_decision[name]] for name in NAMES}
    assert costs["d"] == pytest.approx(costs["a"])
    assert (table.settings["constant_layers"], table.settings["unused_layers"]) == ("none", "c")
    assert table.settings["unread_layers"] == "d"


def test_timesteps_at_which_no_two_layers_differ_say_nothing():
    nothing = part_of(matrix_of(*[0.0] * 6), constant=NAMES)
    lone = part_of(matrix_of(*[0.0] * 6), constant=NAMES[1:])
    alone, probe = probe_of(part_of(ALIKE)), probe_of(part_of(ALIKE), nothing, lone)
    assert importance(probe) == pytest.approx(importance(alone))
    errors = [importance_error(one, ImportanceOptions()) for one in (probe, alone)]
    assert errors[0] == pytest.approx(errors[1])
    with pytest.raises(InputError, match="at no timestep"):
        importance(probe_of(nothing, lone))


def test_a_family_beside_an_exact_one_wastes_all_that_it_may():
    space = make_space()
    exact = [replace(c, error=0.0) if str(c.format) == "kmc3" else c for c in candidates_of(space)]
    table = orthogonality_table(space, exact, probe_of(part_of(ALIKE)))
    by_format = {str(c.format): c.cost for c in table.by_decision["d"]}
    assert by_format["kmc3"] == pytest.approx(13)
    assert by_format["uaq3"] == pytest.approx(13 + MAX_WASTE)


def test_costs_of_one_family_are_the_published_objective():
    table, theta = table_of(probe_of(part_of(ALIKE))), importance(probe_of(part_of(ALIKE)))
    for cost in table.costs:
        if str(cost.format) == "uaq6":
            assert cost.cost == pytest.approx(theta[NAMES.index(cost.decision)] * 10)
        if cost.format == FP16:
            assert cost.cost == 0
    assert table.unit == "missing bits, weighted by importance"


def test_the_better_family_of_equal_bits_is_preferred_but_not_to_a_bit_more():
    table = table_of(probe_of(part_of(ALIKE)))
    by_format = {str(c.format): c.cost for c in table.by_decision["a"]}
    assert by_format["kmc3"] < by_format["uaq3"] < by_format["kmc3"] * 14 / 13
    assert by_format["uaq4"] < by_format["kmc3"]


def test_the_objective_noise_weights_weight_errors():
    table = table_of(probe_of(part_of(ALIKE)), ImportanceOptions(objective="noise"))
    theta = importance(probe_of(part_of(ALIKE)))
    for cost in table.costs:
        expected = theta[NAMES.index(cost.decision)] * relative_error(cost.decision, cost.format)
        assert cost.cost == pytest.approx(expected)


def joint_space(formats="uaq3,uaq4,uaq6,fp16", widths=(4, 8, 16)):
    return search_space(make_graph(), with_activations(parse_formats(formats), widths))


def test_missing_bits_of_weights_and_activations_add_up():
    """Ours: theta (32 - b_w - b_a); weights alone and fp16 cost what they did, fp16 with rounded inputs does cost."""
    space, probe = joint_space(), probe_of(part_of(ALIKE))
    table, theta = orthogonality_table(space, candidates_of(space), probe), importance(probe)
    assert len(table.costs) == 4 * 12
    for cost in table.costs:
        missing = 32 - cost.format.bits - cost.format.activation_bits
        assert cost.cost == pytest.approx(theta[NAMES.index(cost.decision)] * missing)
    assert table.index["a", FP16] == table_of(probe).index["a", FP16]


def test_one_variable_per_pair_under_a_size_and_operations():
    space = joint_space("uaq3,uaq4,uaq6", (4, 8))
    table = orthogonality_table(space, candidates_of(space), probe_of(part_of(EARLY)))
    budget = {"bits": 5.2, "budget_bops": int(0.08 * table.full_bops)}
    free, found = allocate(table, bits=5.2), allocate(table, **budget, gap=0.0)
    assert {f.activation_bits for f in free.choice.values()} == {8}  # operations are not limited
    choices = itertools.product(*table.by_decision.values())
    kept = [c for c in choices if 8 * sum(x.paper_bytes for x in c) <= 5.2 * table.total_params]
    best = min(sum(x.cost for x in c) for c in kept if sum(x.bops for x in c) <= budget["budget_bops"])
    assert found.objective == pytest.approx(best)
    assert found.bops <= budget["budget_bops"]
    assert {f.activation_bits for f in found.choice.values()} == {4, 8}


def test_what_sees_weights_alone_refuses_several_widths():
    space = joint_space(widths=(4, 8))
    with pytest.raises(InputError, match="sees weights alone and cannot choose between uaq3a4 and uaq3a8 for 'a'"):
        error_table(space, candidates_of(space))
    with pytest.raises(InputError, match="sees weights alone"):
        orthogonality_table(space, candidates_of(space), probe_of(part_of(ALIKE)), ImportanceOptions(objective="noise"))
    for method, importance_of in (("error", "bits"), ("orthogonality", "noise")):
        with pytest.raises(InputError, match=r"cannot choose among activations of \[4, 8\] bits"):
            checked(method, space, importance_of)
    one = joint_space(widths=(8,))
    table = error_table(one, candidates_of(one))
    assert table.index["b", Format.parse("fp16a8")].cost == 0
    for method in ("orthogonality", "jacobian", "ablation", "sqnr", "gnn"):
        checked(method, space)


def checked(name, space, importance_of="bits"):
    method, _ = method_named(name)
    knobs = ImportanceOptions(objective=importance_of) if name == "orthogonality" else method.knobs()
    method.check(Task(knobs, BudgetSettings(bits=4.0)), space.decisions[0].formats)


@settings(max_examples=60)
@given(
    entries=st.lists(st.floats(0.01, 0.99), min_size=6, max_size=6),
    bits=st.floats(3.6, 6.9),
    objective=st.sampled_from(["bits", "noise"]),
)
def test_the_exact_choice_is_never_worse_than_the_rounded_programme_nor_over_the_budget(entries, bits, objective):
    table = table_of(probe_of(part_of(matrix_of(*entries))), ImportanceOptions(objective=objective))
    exact, rounded = (allocate(table, bits=bits, rule=rule) for rule in ("milp", "lp"))
    assert exact.objective <= rounded.objective + FLOAT64_FORMULA
    for found in (exact, rounded):
        used = sum(table.index[d, f].paper_bytes for d, f in found.choice.items())
        assert 8 * used <= bits * table.total_params


def test_more_timesteps_change_little_once_there_are_enough():
    probe = probe_of(*(part_of(EARLY) for _ in range(4)))
    assert converged(probe) == pytest.approx((1.0, 1.0, 1.0, 1.0))


def test_timesteps_that_rank_nothing_have_no_rank_correlation():
    nothing = part_of(matrix_of(*[0.0] * 6), constant=NAMES)
    found = converged(
        probe_of(part_of(EARLY), nothing, part_of(LATE))
    )  # of one timestep, that is the one in the middle
    assert math.isnan(found[0])
    assert found[2] == pytest.approx(1)
    alike = converged(probe_of(part_of(matrix_of(*[0.5] * 6)), part_of(matrix_of(*[0.5] * 6))))
    assert all(map(math.isnan, alike))


@pytest.mark.parametrize("change", [{"beta": -1.0}, {"tau": math.inf}, {"beta": math.nan}, {"objective": "guess"}])
def test_knobs_that_mean_nothing_are_refused(change):
    with pytest.raises(InputError):
        replace(ImportanceOptions(), **change)
