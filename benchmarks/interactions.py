"""When does the graph tell more than the additive noise model? Planted interactions, by strength and number of recipes.

    python benchmarks/interactions.py --run runs/predictor/paper [--strengths 0 1 4] [--trials 300 1200] [--out FILE]

Denoiser, prior and candidates are those of a study (`benchmarks/predictor.py` leaves one), the quality is planted: each
layer's noise power is its prior's cost times a factor per operation and layer, and layers that the graph connects
within two steps also add `strength` times the geometric mean of their powers, as amplitudes that go together do. A
trial is measured with 0.3 dB of error; predictors are judged on 200 recipes by the noise-free truth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from scipy import stats

from sedimo.lab.exploration import Exploration
from sedimo.lab.study import Study
from sedimo.methods.predictor.features import graph_features, picked
from sedimo.methods.predictor.study import read_background
from sedimo.methods.predictor.training import FAST, TrainingSet, train_predictor

N_TEST, ERROR_DB, REACH = 200, 0.3, 2
LOW_BITS, HIGH_BITS = 3.3, 3.7


def neighbours(known) -> np.ndarray:
    """Which decisions the graph connects within two steps, `[D, D]`, each pair once."""
    graph, space = known.graph, known.space
    n = len(graph.nodes)
    step = np.eye(n, dtype=bool)
    for source, target in graph.edges:
        step[source, target] = True
    reach = np.linalg.matrix_power(step.astype(int), REACH) > 0
    place = {node.name: i for i, node in enumerate(graph.nodes)}
    nodes = [place[d.layers[0]] for d in space.decisions]
    found = reach[np.ix_(nodes, nodes)]
    return np.triu(found | found.T, 1)


def planted(known, strength: float, codes: np.ndarray) -> np.ndarray:
    """Noise-free quality [dB] of recipes `[T, D]`."""
    generator, factors = np.random.default_rng(0), {}
    for decision in known.space.decisions:
        factors.setdefault(decision.operation, float(np.exp(0.5 * generator.standard_normal())))
    own = np.array([factors[d.operation] * np.exp(0.4 * generator.standard_normal()) for d in known.space.decisions])
    powers = picked(known.prior(), codes) * own
    roots = np.sqrt(powers)
    together = np.einsum("ti,ij,tj->t", roots, neighbours(known).astype(float), roots)
    return -10 * np.log10(powers.sum(axis=1) + strength * together)


def compare(known, strength: float, n_trials: int) -> dict[str, float]:
    """SRCC to the truth of the predictor and of its noise models alone, and their difference's bootstrap interval."""
    choices = known.choices
    exploration = Exploration(0, known.space, "stratified", LOW_BITS, HIGH_BITS)
    codes = choices.codes([exploration.recipe(i) for i in range(n_trials + N_TEST)])
    truth = planted(known, strength, codes)
    measured = truth + ERROR_DB * np.random.default_rng(1).standard_normal(len(truth))
    features = graph_features(known.graph, choices, known.candidates)
    train = slice(0, n_trials)
    data = TrainingSet(features, choices, known.prior(), codes[train], measured[train], measured[train])
    predictor = train_predictor(data, FAST)
    test, y = codes[n_trials:], truth[n_trials:]
    graph = predictor.predict(test)
    additive = np.mean([fold.network.noise.predict(test) for fold in predictor.folds], axis=0)
    generator = np.random.default_rng(2)
    picks = generator.integers(0, N_TEST, (1000, N_TEST))
    gains = [_srcc(graph[p], y[p]) - _srcc(additive[p], y[p]) for p in picks]
    return {
        "strength": strength,
        "trials": n_trials,
        "share_of_noise_from_interactions": _share(known, strength, test),
        "srcc_noise_model": _srcc(additive, y),
        "srcc_with_graph": _srcc(graph, y),
        "gain_low": float(np.quantile(gains, 0.025)),
        "gain_high": float(np.quantile(gains, 0.975)),
        "epochs": float(np.mean([fold.n_epochs for fold in predictor.folds])),
    }


def _share(known, strength: float, codes: np.ndarray) -> float:
    alone = 10 ** (-planted(known, 0.0, codes) / 10)
    return float((1 - alone / 10 ** (-planted(known, strength, codes) / 10)).mean())


def _srcc(x: np.ndarray, y: np.ndarray) -> float:
    return float(stats.spearmanr(x, y).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.0, 1.0, 4.0])
    parser.add_argument("--trials", type=int, nargs="*", default=[300, 1200])
    parser.add_argument("--out", type=Path, default=Path("runs/interactions.json"))
    arguments = parser.parse_args()
    with Study(arguments.run, create=False) as study:
        known = read_background(study)
    found = []
    for strength in arguments.strengths:
        for n_trials in arguments.trials:
            found.append(compare(known, strength, n_trials))
            print(json.dumps(found[-1]), flush=True)
            arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
