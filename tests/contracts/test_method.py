"""What every method keeps to: words, a price, a table of finite costs for all candidates, a recipe in the budget."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

import sedimo
from contracts.toys import TOY_METHOD
from sedimo import methods
from sedimo.allocation.budget import BudgetSettings
from sedimo.errors import InputError
from sedimo.lab.lab import Lab
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import Study
from sedimo.methods import METHODS, method_named
from sedimo.methods.hybrid import KeepSettings
from sedimo.methods.method import Task
from sedimo.methods.modelopt import PeerRecipe, is_installed
from sedimo.quant.formats import Format
from sedimo.settings import REQUIRED, leaves

BITS = 5.0
FEW_TRIALS = {"n_trials": 24, "n_rounds": 0}
names = {"ids": lambda method: method.name}


@pytest.fixture(scope="module")
def lab(tiny_pipeline_folder, tmp_path_factory):
    """A tiny pipeline with a study, so that what one method has measured no other measures again."""
    pipe = sedimo.load(tiny_pipeline_folder)
    sampling = SamplingSettings(n_seeds=2, n_steps=2, n_check_seeds=2)
    with Study(tmp_path_factory.mktemp("methods")) as study:
        yield Lab(pipe, formats="uaq3,uaq4,uaq8", study=study, sampling=sampling)


def task_for(method):
    """A task under a budget, with few trials, and with a format where the method cannot do without."""
    number_format = Format.parse("uaq4") if method.needs_format else None
    knobs = method.knobs(**FEW_TRIALS) if learns_from_trials(method) else method.knobs()
    return Task(knobs, BudgetSettings(bits=BITS), number_format=number_format)


def learns_from_trials(method):
    """Whether it learns from measured recipes, which takes minutes."""
    return any(f.name == "n_trials" for f in fields(method.knobs))


class MethodContract:
    """One method on a tiny pipeline; `method` and `lab` are fixtures."""

    def test_its_words_are_filled(self, method):
        words = method.words
        assert all((words.summary, words.sees, words.misses))
        assert "\n" not in words.summary
        assert not any(text.endswith(".") for text in (words.summary, words.cost, words.sees, words.misses))
        assert words.cost or method.is_described or method.contains

    def test_what_people_may_set_has_a_default_a_flag_and_help(self, method):
        assert all(leaf.flags and leaf.help and leaf.default is not REQUIRED for leaf in leaves(method.knobs))
        assert len(fields(method.knobs)) >= len([*leaves(method.knobs)])

    def test_it_is_found_by_its_name(self, method):
        text = f"{method.name}:uaq4" if method.needs_format else method.name
        assert method_named(text)[0] is method
        assert set(method.contains) <= {m.name for m in methods.METHODS}

    def test_its_price_is_that_of_running_the_pipeline(self, method, lab):
        price = method.price(lab, task_for(method))
        assert min(price.seconds, price.n_calls, price.memory_bytes, price.disk_bytes) >= 0
        if method.runs_pipeline:
            assert min(price.seconds, price.n_calls) > 0

    def test_it_has_a_finite_cost_for_every_candidate_of_its_bank(self, method, lab):
        found = method.measure(lab, task_for(method))
        assert set(found.table.index) == {(c.decision, c.format) for c in found.bank.candidates}
        assert set(found.table.layers) == set(found.bank.space.decision_index) == set(lab.space.decision_index)
        assert all(0 <= c.cost < math.inf for c in found.table.costs)
        assert all(isinstance(found.of(kind), kind) for kind in found.evidence)

    def test_its_recipe_keeps_the_budget(self, method, lab):
        found = method.find(lab, task_for(method))
        if method.is_peer:
            assert found.need(PeerRecipe).paper_bits <= BITS
            return
        assert found.allocation.paper_bits <= BITS
        assert lab.space.paper_bits(found.allocation.recipe) == pytest.approx(found.allocation.paper_bits)
        assert any(f.is_quantized for f in found.allocation.choice.values())


@pytest.mark.parametrize("method", [m for m in METHODS if not m.is_peer and not learns_from_trials(m)], **names)
class TestMethods(MethodContract):
    """Those of Sedimo that look at single decisions."""


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if learns_from_trials(m)], **names)
class TestSearches(MethodContract):
    """Those that learn from measured recipes."""


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(), reason="the extra `peers` is not installed")
@pytest.mark.parametrize("method", [m for m in METHODS if m.is_peer], **names)
class TestPeers(MethodContract):
    """Those of other tools."""


class TestToyMethod(MethodContract):
    """A method that is added by putting it into the tuple."""

    @pytest.fixture
    def method(self, monkeypatch):
        monkeypatch.setattr(methods, "METHODS", (*METHODS, TOY_METHOD))
        return TOY_METHOD

    def test_where_layers_cost_alike_small_ones_keep_the_bits(self, method, lab):
        choice = method.find(lab, task_for(method)).allocation.choice
        by_size = [choice[d.name].bits for d in sorted(lab.space.decisions, key=lambda d: d.params)]
        assert (by_size[0], by_size[-1]) == (8, 3)


def test_a_name_that_there_is_not_is_refused_with_those_that_there_are():
    for text in ("toy", "hybrid", "error:kmc4", "", "Error"):
        with pytest.raises(InputError, match=r"the method must be one of auto, error, .*, uniform:FORMAT or hybrid"):
            method_named(text)
    assert method_named("uniform:kmc4") == (method_named("uniform")[0], Format.parse("kmc4"))
    with pytest.raises(InputError):
        method_named("uniform:nothing")


def test_a_task_of_hybrid_precision_needs_a_format_that_changes_weights_and_one_rule():
    hybrid, _ = method_named("hybrid:uaq4")
    uaq4, bits = Format.parse("uaq4"), BudgetSettings(bits=5.0)
    hybrid.check(Task(KeepSettings(), bits, number_format=uaq4), [uaq4])
    for task, words in (
        (Task(KeepSettings(), bits), "needs a format"),
        (Task(KeepSettings(), bits, number_format=Format.parse("fp16")), "a format that changes weights"),
        (Task(KeepSettings(), number_format=uaq4), "needs a rule which blocks stay"),
        (Task(KeepSettings(keep=1), bits, number_format=uaq4), "give one rule"),
        (Task(KeepSettings(), BudgetSettings(n_bytes=10_000), number_format=uaq4), "budgets in paper bits alone"),
    ):
        with pytest.raises(InputError, match=words):
            hybrid.check(task, [uaq4])


def test_methods_that_see_weights_alone_refuse_several_widths_of_activations():
    widths = [Format.parse("uaq4"), Format.parse("uaq4a8")]
    for name in ("error", "orthogonality-noise"):
        method, _ = method_named(name)
        with pytest.raises(InputError, match=rf"{name}.* sees weights alone"):
            method.check(Task(method.knobs()), widths)
        method.check(Task(method.knobs()), widths[1:])
    orthogonality, _ = method_named("orthogonality")
    orthogonality.check(Task(orthogonality.knobs()), widths)
    with pytest.raises(InputError, match=r"orthogonality.* sees weights alone"):
        orthogonality.check(Task(orthogonality.knobs(objective="noise")), widths)


def test_samples_are_a_methods_own_those_of_the_task_or_those_of_a_plan(lab):
    jacobian, _ = method_named("jacobian")
    plan = lab.seeds.plan((5, 7, 9))
    for task, seeds in (
        (Task(jacobian.knobs()), lab.seeds.search.seeds),
        (Task(jacobian.knobs(), n_samples=4), lab.seeds.more(4).seeds),
        (Task(jacobian.knobs(), on=plan), plan.seeds),
    ):
        (probe,) = jacobian.measure(lab, task).evidence.values()
        assert probe.setting.seeds == seeds
