"""Which methods see that a layer cannot matter: a denoiser some of whose layers are behind a gain of zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sedimo.allocation.combine import geometric_mean, rank_average
from sedimo.bank import fit_bank
from sedimo.graph.model import DenoiserGraph, Node
from sedimo.lab.exploration import Exploration
from sedimo.lab.lab import Lab
from sedimo.lab.measuring import TrialWorker, run_trials, setting_of
from sedimo.lab.study import Study
from sedimo.methods import modelopt
from sedimo.methods.ablation import ablation_table, plan_probes
from sedimo.methods.error import error_table
from sedimo.methods.jacobian import jacobian_table, probe_jacobian
from sedimo.methods.orthogonality import ImportanceOptions, orthogonality_table, probe_orthogonality
from sedimo.methods.predictor.goal import Goal
from sedimo.methods.predictor.scoring import noise_table
from sedimo.methods.predictor.study import Background, training_set
from sedimo.methods.predictor.training import FAST, train_predictor
from sedimo.methods.sqnr import probe_sqnr, sqnr_table
from sedimo.pipelines.adapter import Sampling
from sedimo.space import search_space
from toy_pipeline import ToyAdapter, ToyWeights

ALIVE, DEAD = ("conv_in", "mix", "refine", "out"), ("dead_conv", "dead_first", "dead_last")
SAMPLING = Sampling(seeds=tuple(range(6)), n_steps=2, batch_size=6)
N_TRIALS = 60


class Planted(nn.Module):
    """Four layers that make the output, and three whose outputs a gain of zero takes away, as at initialisation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(2, 32, 3, padding=1)
        self.mix, self.refine, self.dead_first, self.dead_last = (nn.Linear(32, 32) for _ in range(4))
        self.dead_conv = nn.Conv2d(32, 32, 3, padding=1)
        self.out = nn.Conv2d(32, 2, 1)
        self.gain = nn.Parameter(torch.zeros(2))

    def forward(self, sample, timestep, label=None, return_dict=True):
        x = torch.tanh(2 * self.conv_in(sample) + timestep)
        x = x + self.gain[0] * self.dead_conv(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + torch.tanh(2 * self.mix(tokens))
        tokens = tokens + self.gain[1] * self.dead_last(torch.tanh(self.dead_first(tokens)))
        tokens = tokens + self.refine(tokens)
        return {"sample": self.out(tokens.transpose(1, 2).reshape(x.shape))}


class Setup:
    """The planted denoiser with the candidates of its layers."""

    def __init__(self, folder):
        self.adapter = ToyAdapter(Planted())
        modules = {n: m for n, m in self.adapter.denoiser.named_modules() if hasattr(m, "weight")}
        nodes = [
            Node(n, "layer", n, "", m.weight.numel(), type(m).__name__, tuple(m.weight.shape))
            for n, m in modules.items()
        ]
        edges = tuple((i, i + 1) for i in range(len(nodes) - 1))
        self.graph = DenoiserGraph("Planted", tuple(nodes), edges, ())
        self.bank = fit_bank(ToyWeights(self.adapter.denoiser), search_space(self.graph, "uaq2,uaq3,uaq4,uaq6"))
        self.study = Study(folder)
        self.about = (self.bank.space, self.bank.candidates)

    def trials(self, recipes):
        setting = setting_of(self.adapter, SAMPLING, weights_digest=self.bank.weights_digest)
        worker = TrialWorker(self.adapter, self.bank, SAMPLING, objective="final_latents")
        return run_trials(self.study, recipes, setting=setting, make_worker=lambda: worker)

    def error(self):
        return error_table(*self.about)

    def jacobian(self):
        return jacobian_table(*self.about, probe_jacobian(Lab(self.adapter, self.bank), SAMPLING))

    def ablation(self):
        probes = plan_probes(*self.about)
        trials = self.trials([self.bank.space.recipe(dict([probe])) for probe in probes])
        return ablation_table(*self.about, {p: t.powers for p, t in zip(probes, trials, strict=True)})

    def combined(self):
        return geometric_mean(self.ablation(), self.jacobian())

    def sqnr(self):
        return sqnr_table(*self.about, probe_sqnr(Lab(self.adapter, self.bank), SAMPLING))

    def orthogonality(self, objective="bits"):
        layers = [d.name for d in self.bank.space.decisions]
        probe = probe_orthogonality(Lab(self.adapter, self.bank), layers, SAMPLING)
        return orthogonality_table(*self.about, probe, ImportanceOptions(beta=3.0, objective=objective))

    def rank_average(self):
        return rank_average([self.jacobian(), self.ablation(), self.sqnr()])

    def gnn(self):
        """Costs of a predictor that starts from weight errors, which do not see the plant, and learns from trials."""
        known = Background(self.graph, self.bank.space, self.bank.index, self.error(), self.bank.digest)
        exploration = Exploration(0, self.bank.space, "stratified")
        data = training_set(known, self.trials([exploration.recipe(i) for i in range(N_TRIALS)]), Goal.parse("sqnr_db"))
        predictor = train_predictor(data, replace(FAST, n_folds=2, n_epochs=4, patience=2))
        best = data.codes[int(data.quality.argmax())]
        return noise_table(predictor, known.candidates, best, confidence=0.0)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    setup = Setup(tmp_path_factory.mktemp("planted"))
    yield setup
    setup.study.close()


def costs_of(table, layers):
    """Costs of the layers at three bits."""
    return [c.cost for name in layers for c in table.by_decision[name] if str(c.format) == "uaq3"]


@pytest.mark.parametrize("method", ["jacobian", "ablation", "combined"])
def test_methods_that_look_at_the_denoisers_output_see_that_dead_layers_cost_nothing(planted, method):
    table = getattr(planted, method)()
    assert costs_of(table, DEAD) == [0.0, 0.0, 0.0]
    assert all(cost > 0 for cost in costs_of(table, ALIVE))


@pytest.mark.parametrize(
    ("method", "options"), [("error", ()), ("sqnr", ()), ("orthogonality", ("bits",)), ("orthogonality", ("noise",))]
)
def test_methods_that_look_at_weights_or_layers_alone_cannot_see_it(planted, method, options):
    table = getattr(planted, method)(*options)
    alive, dead = costs_of(table, ALIVE), costs_of(table, DEAD)
    assert min(dead) > 0
    assert max(dead) > min(alive)  # some dead layer would get bits before some layer that matters


def test_an_average_of_ranks_sees_it_where_most_of_its_methods_do(planted):
    table = planted.rank_average()
    assert max(costs_of(table, DEAD)) < min(costs_of(table, ALIVE))


@pytest.mark.slow
@pytest.mark.skipif(not modelopt.is_installed(), reason="the extra `peers` is not installed")
def test_modelopt_sees_it_by_its_gradients(planted):
    shapes = {name: tuple(planted.adapter.denoiser.get_submodule(name).weight.shape) for name in (*ALIVE, *DEAD)}
    found = modelopt.measure_scores(Lab(planted.adapter, planted.bank), shapes, SAMPLING)
    scores = {layer: group.scores["int3"] for group in found.groups for layer in group.layers}
    assert {name for name, score in scores.items() if score == 0.0} == set(DEAD)


def test_a_predictor_learns_it_from_measured_recipes(planted):
    table = planted.gnn()
    assert max(costs_of(table, DEAD)) < 0.5 * min(costs_of(table, ALIVE))  # 60 recipes cannot tell little from nothing
