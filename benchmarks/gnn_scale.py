"""Training and attribution at published size: seconds of five folds and of all variants of all groups.

    python benchmarks/gnn_scale.py [--denoisers PixArt-XL SDXL] [--trials 500] [--paper-epochs 30] [--json FILE]

No weight is read: the graph is traced from the config, and the quality of each recipe comes from a planted noise model
(each operation, block and layer matters by a log-normal factor, measured with 0.5 dB of error), so that the time and
the rank correlation can be told. The published preset is trained on one fold for `--paper-epochs` of its 10,000 epochs;
its seconds per epoch tell what all of them would take.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "graph"))
from denoisers import PUBLISHED, published

from sedimo.bank import Candidate
from sedimo.graph.groups import split_groups
from sedimo.graph.trace import trace_denoiser
from sedimo.lab.exploration import Exploration
from sedimo.methods.predictor.features import Choices, disjoint_groups, graph_features, picked
from sedimo.methods.predictor.scoring import group_scores, hop_moments, most_common
from sedimo.methods.predictor.training import FAST, PAPER, TrainingSet, train_predictor
from sedimo.space import search_space

MAX_VARIANTS = 8_000
ERROR_DB = 0.5


def planted(name: str, n_trials: int):
    """Graph, training set and the noise-free quality of its recipes."""
    graph = trace_denoiser(published(name))
    choices = Choices(search_space(graph, "paper", streams=False))
    space = choices.space
    generator = np.random.default_rng(0)
    factors: dict[str, float] = {}

    def factor(key: str, sigma: float) -> float:
        return factors.setdefault(key, float(np.exp(sigma * generator.standard_normal())))

    candidates = {}
    for d in space.decisions:
        for f in d.formats:
            error = 4.0 ** -(f.bits - 1) * (0.8 if f.family == "kmc" else 1.0)
            candidates[d.name, f] = Candidate(d.name, f, error, 0.0, 0, d.paper_bytes(f), d.stored_bytes(f))
    costs = choices.array(
        lambda d, f: (
            candidates[d.name, f].error
            * factor(f"operation {d.operation}", 1.2)
            * factor(f"block {d.block}", 0.6)
            * factor(f"decision {d.name}", 0.5)
            * factor(f"method {d.operation} {f.family}", 0.2)
        )
    )
    exploration = Exploration(0, space, "stratified")
    codes = choices.codes([exploration.recipe(i) for i in range(n_trials)])
    quality = -10 * np.log10(picked(costs, codes).sum(axis=1) / len(space.decisions))
    measured = quality + ERROR_DB * generator.standard_normal(n_trials)
    target = measured - 10 * choices.paper_bits(codes)
    features = graph_features(graph, choices, candidates)
    return (
        graph,
        TrainingSet(
            features, choices, choices.array(lambda d, f: candidates[d.name, f].error), codes, measured, target
        ),
        quality,
    )


def measure(name: str, n_trials: int, paper_epochs: int) -> dict[str, object]:
    """One denoiser."""
    graph, data, truth = planted(name, n_trials)
    begin = time.perf_counter()
    predictor = train_predictor(data, FAST)
    seconds = time.perf_counter() - begin
    held_out = predictor.cross_validated()
    found: dict[str, object] = {
        "denoiser": name,
        "n_nodes": len(graph.nodes),
        "n_decisions": len(data.choices.space.decisions),
        "trials": n_trials,
        "fast_seconds_five_folds": round(seconds, 1),
        "fast_epochs": [fold.n_epochs for fold in predictor.folds],
        "fast_srcc_to_measured": round(float(stats.spearmanr(held_out, data.quality).statistic), 4),
        "fast_srcc_to_truth": round(float(stats.spearmanr(held_out, truth).statistic), 4),
    }
    print(json.dumps(found), flush=True)
    begin = time.perf_counter()
    moments = hop_moments(predictor)
    reference = most_common(data)
    groups = split_groups(graph, n_options=data.choices.n_options, max_variants=MAX_VARIANTS)
    n_variants = 0
    for group in disjoint_groups(data.choices.space, groups):
        n_variants += group_scores(predictor, group, moments, reference=reference).shape[1]
    found |= {"variants": n_variants, "variant_seconds_five_folds": round(time.perf_counter() - begin, 1)}
    print(json.dumps(found), flush=True)
    if paper_epochs:
        found |= published_preset(data, paper_epochs)
    return found


def published_preset(data: TrainingSet, n_epochs: int) -> dict[str, object]:
    """The published network and loss for some epochs, two folds."""
    begin = time.perf_counter()
    predictor = train_predictor(data, replace(PAPER, n_epochs=n_epochs, patience=n_epochs, n_folds=2))
    seconds = (time.perf_counter() - begin) / (2 * n_epochs)
    srcc = [stats.spearmanr(f.predicted, data.target[f.test]).statistic for f in predictor.folds]
    return {
        "paper_epochs": n_epochs,
        "paper_seconds_per_epoch": round(seconds, 2),
        "paper_hours_of_all": round(seconds * 10_000 * 5 * 1.6 / 3600, 1),  # four fifths of the trials instead of half
        "paper_srcc": [round(float(s), 4) for s in srcc],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--denoisers", nargs="*", default=["PixArt-XL", "SDXL"], choices=list(PUBLISHED))
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--paper-epochs", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.denoisers:
        rows.append(measure(name, arguments.trials, arguments.paper_epochs))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
