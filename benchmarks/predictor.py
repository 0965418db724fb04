"""How well does the predictor rank recipes, and does its system find better ones? Paired, on fresh seeds.

    python benchmarks/predictor.py [--source zoo:cifar-dit] [--run runs/predictor] [--out results.json] [--seeds 0 1 2]

Per formats and seed of the method: 300 stratified recipes and 60 more at 3.5 bits (`paper`) or 4.0 (`wide`), the
predictor beside its rivals on recipes that none has seen, the noise ceiling (the same recipes on other seeds), the
learning curve; then recipes at several budgets, one shot from 300 trials, and refined at equal cost (150 random, three
rounds of 50), each with a final of up to five recipes on 32 other seeds, against uniform, best random, error, jacobian
and ablation on 64 fresh seeds x 20 steps. Formats are fitted and the prior is taken in float32; trials are sampled in
--dtype. With --images N, FID of the first seed's recipes on N images x 10 steps, beside that of full precision from
the same seeds. Every trial is kept in the study under --run: a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

import sedimo
from _suite.signal import summarize
from sedimo.allocation.budget import BudgetSettings, allocated
from sedimo.cli.console import ConsoleProgress
from sedimo.codec import to_plain
from sedimo.lab.bench import Compute
from sedimo.lab.exploration import Exploration, random_recipe_near
from sedimo.lab.lab import Lab
from sedimo.lab.study import Trial
from sedimo.methods.ablation import ABLATION
from sedimo.methods.error import error_table
from sedimo.methods.method import NO_KNOBS, Task
from sedimo.methods.predictor.goal import Goal
from sedimo.methods.predictor.quality import rate
from sedimo.methods.predictor.scoring import calibrated_table, hop_moments, option_scores
from sedimo.methods.predictor.study import Background, measure_background, measures_of, training_set
from sedimo.methods.predictor.training import FAST, PAPER, train_predictor
from sedimo.methods.search import Search, SearchSettings, build, hold_final, keeps, search
from sedimo.metrics.signal import paired_difference
from sedimo.pipelines.adapter import Sampling

BUDGETS = {"paper": (3.3, 3.5, 3.7, 4.0), "wide": (3.5, 4.0, 4.5, 5.0)}
RANGES = {"paper": (3.0, 4.5), "wide": (3.0, 5.0)}
BAND = {"paper": 3.5, "wide": 4.0}
N_TRIALS, N_EXTRA, N_ROUNDS = 300, 60, 3
CURVE = (50, 100, 200, 300, 500)
QUALITIES = ("srcc", "kendall_tau", "ndcg_at_10", "mae")
GOAL = Goal.parse("sqnr_db")


@dataclass(frozen=True)
class Bench:
    """One set of formats; the lab is in the dtype of the trials."""

    lab: Lab
    known: Background
    formats: str
    progress: ConsoleProgress

    def on(self, first: int, n: int, n_steps: int) -> Sampling:
        """The plan of seeds `first` to `first + n`."""
        return self.lab.pipe.default_sampling(range(first, first + n), n_steps)

    def searched(self, recipes: Sequence[sedimo.Recipe]) -> tuple[Trial, ...]:
        """Trials on the seeds of the search."""
        return self.lab.measure(recipes, self.on(0, 8, 10))

    def fresh(self, recipes: Sequence[sedimo.Recipe]) -> tuple[Trial, ...]:
        """Trials on the seeds of the figures."""
        return self.lab.measure(recipes, self.on(1000, 64, 20))


def open_bench(arguments: argparse.Namespace, formats: str, progress: ConsoleProgress) -> Bench:
    """Bank and prior in float32, and a lab in the dtype of the trials."""
    exact = sedimo.Lab(
        arguments.source,
        store=arguments.run / formats,
        formats=formats,
        compute=Compute("fp32"),
        progress=progress,
    )
    pipe = sedimo.load(arguments.source, dtype=arguments.dtype)
    lab = Lab(pipe, exact.bank, graph=exact.graph, study=exact.study, progress=progress)
    return Bench(lab, measure_background(exact), formats, progress)


def exploration_of(bench: Bench, seed: int) -> Exploration:
    """The random recipes of a seed of the method."""
    low, high = RANGES[bench.formats]
    return Exploration(seed, bench.known.space, "stratified", low, high)


def near_recipes(bench: Bench) -> list[object]:
    """The further recipes in the band, which no predictor is trained on."""
    space = bench.known.space
    return [random_recipe_near(space, BAND[bench.formats], 99, i, tolerance=0.05) for i in range(N_EXTRA)]


def quality_of_predictor(bench: Bench, seed: int) -> tuple[dict[str, object], object]:
    """The predictor beside its rivals; returns it too."""
    begin = time.perf_counter()
    exploration = exploration_of(bench, seed)
    trials = bench.searched([exploration.recipe(i) for i in range(N_TRIALS)])
    measured_seconds = time.perf_counter() - begin
    near = near_recipes(bench)
    data, extra = (training_set(bench.known, some, GOAL) for some in (trials, bench.searched(near)))
    begin = time.perf_counter()
    predictor = train_predictor(data, FAST, progress=bench.progress)
    seconds = time.perf_counter() - begin
    ratings = rate(predictor, bench.known, extra=extra, around=BAND[bench.formats])
    other = [measures_of(t, bench.known.space)["sqnr_db"] for t in bench.lab.measure(near, bench.on(500, 8, 10))]
    found = {
        "measured_seconds_if_new": measured_seconds,
        "training_seconds": seconds,
        "epochs": [fold.n_epochs for fold in predictor.folds],
        "hop_srcc": np.mean([fold.hop_srcc for fold in predictor.folds], axis=0).tolist(),
        "noise_ceiling_srcc": float(stats.spearmanr(extra.quality, other).statistic),
        "rows": [
            {
                "predictor": r.predictor,
                "subset": r.subset,
                **{k: to_plain(getattr(r, k)) for k in QUALITIES},
            }
            for r in ratings
        ],
        "ahead_of": {f"{r.predictor} | {r.subset}": to_plain(r.advantage) for r in ratings if r.advantage is not None},
    }
    return found, predictor


def learning_curve(bench: Bench, seed: int) -> list[dict[str, float]]:
    """SRCC on the extra recipes by number of trials."""
    exploration = exploration_of(bench, seed)
    trials = bench.searched([exploration.recipe(i) for i in range(max(CURVE))])
    near = near_recipes(bench)
    extra = training_set(bench.known, bench.searched(near), GOAL)
    found = []
    for n in CURVE:
        data = training_set(bench.known, trials[:n], GOAL)
        predictor = train_predictor(data, FAST)
        base = np.mean([fold.network.noise.predict(extra.codes) for fold in predictor.folds], axis=0)
        srcc = float(stats.spearmanr(predictor.predict(extra.codes), extra.quality).statistic)
        found.append(
            {"trials": n, "srcc": srcc, "srcc_without_graph": float(stats.spearmanr(base, extra.quality).statistic)}
        )
        print(found[-1], flush=True)
    return found


def published(bench: Bench, seed: int) -> dict[str, object]:
    """The preset `paper` on the same recipes: how it ranks, and its recipe by calibrated scores, measured."""
    known, bits = bench.known, BAND[bench.formats]
    trials = bench.searched([exploration_of(bench, seed).recipe(i) for i in range(N_TRIALS)])
    data, extra = (training_set(known, some, GOAL) for some in (trials, bench.searched(near_recipes(bench))))
    begin = time.perf_counter()
    predictor = train_predictor(data, PAPER, progress=bench.progress)
    seconds = time.perf_counter() - begin
    scores = option_scores(predictor, hop_moments(predictor))
    table, _ = calibrated_table(predictor, known.candidates, scores, confidence=1.0, goal=GOAL)
    recipe = allocated(table, BudgetSettings(bits=bits)).recipe
    ratings = rate(predictor, known, extra=extra)
    rows = {r.subset: to_plain(r.srcc) for r in ratings if r.is_used}
    return {
        "training_seconds": seconds,
        "epochs": [fold.n_epochs for fold in predictor.folds],
        "srcc": rows,
        "recipe": to_plain(summarize(bench.fresh([recipe])[0].powers)),
    }


def recipes_at(bench: Bench, seed: int, bits: float, predictor) -> dict[str, object]:
    """One shot, refined, and what needs no search, at one budget."""
    budget = BudgetSettings(bits=bits)
    settings = SearchSettings(N_TRIALS, N_ROUNDS, seed=seed)
    refined = search(bench.lab, bench.known, settings, budget)
    table, allocation = build(bench.known, predictor, budget, confidence=1.0)
    random = bench.searched([exploration_of(bench, seed).recipe(i) for i in range(N_TRIALS)])
    one_shot = Search(table, allocation, predictor, random, (), N_TRIALS)
    final, first = (hold_final(bench.lab, bench.known, found, budget) for found in (refined, one_shot))
    ablation = ABLATION.measure(bench.lab, Task(NO_KNOBS, budget, is_checked=False, on=bench.on(0, 8, 10))).table
    space = bench.known.space
    uniform = [space.uniform(f) for f in space.common_formats]
    within = [t for t in random if keeps(bench.known, t.recipe, budget)]
    within.sort(key=lambda t: -t.score)
    return {
        "gnn, one shot": first.allocation.recipe,
        "gnn, refined": final.allocation.recipe,
        "one shot, no final": allocation.recipe,
        "refined, no final": refined.allocation.recipe,
        "jacobian": allocated(bench.known.table, budget).recipe,
        "ablation": allocated(ablation, budget).recipe,
        "error": allocated(error_table(space, bench.known.candidates.values()), budget).recipe,
        "best uniform": best_of(bench, [u for u in uniform if space.paper_bits(u) <= bits + 0.1]),
        "best random": best_of(bench, [t.recipe for t in within[:5]]),
    }


def best_of(bench: Bench, recipes: Sequence[sedimo.Recipe]) -> sedimo.Recipe:
    """The best on seeds that the figures do not use."""
    return max(bench.lab.measure(recipes, bench.on(3000, 16, 20)), key=lambda t: t.score).recipe


def compare(bench: Bench, recipes: dict[str, object]) -> dict[str, object]:
    """SQNR on fresh seeds, and the refined recipe minus each other one, paired."""
    trials = dict(zip(recipes, bench.fresh(list(recipes.values())), strict=True))
    space = bench.known.space
    rows = {
        n: {
            "paper_bits": space.paper_bits(recipes[n]),
            "stored_bits": 8 * bench.lab.bank.stored_bytes(recipes[n]) / space.params,
            **to_plain(summarize(t.powers)),
        }
        for n, t in trials.items()
    }
    differences = {
        mine: {n: to_plain(paired_difference(trials[mine].powers, t.powers)) for n, t in trials.items() if n != mine}
        for mine in ("gnn, one shot", "gnn, refined")
    }
    return {"rows": rows, "differences": differences}


def show_quality(found: dict[str, Any]) -> None:
    """What the predictor reaches beside its rivals, on the screen."""
    print(json.dumps({k: v for k, v in found.items() if k not in ("rows", "ahead_of")}), flush=True)
    for row in found["rows"]:
        interval = f"[{row['srcc']['low']:.3f}, {row['srcc']['high']:.3f}]"
        print(f"  {row['subset']:26s} {row['predictor']:26s} SRCC {row['srcc']['value']:.3f} {interval}", flush=True)


def distances(bench: Bench, recipes: dict[str, object], n_images: int) -> dict[str, object]:
    """FID of recipes, and their difference to full precision on the same seeds."""
    recipes = {name: recipe for name, recipe in recipes.items() if not name.endswith("no final")}
    trials = bench.lab.measure(list(recipes.values()), bench.on(100_000, n_images, 10), objective="fid")
    return {
        name: {"sqnr_db": summarize(trial.powers).sqnr_db, **{k: to_plain(v) for k, v in trial.measures.items()}}
        for name, trial in zip(recipes, trials, strict=True)
    }


def show(title: str, found: dict[str, Any]) -> None:
    """A table on the screen."""
    print(f"\n{title}")
    for name, row in found["rows"].items():
        text = f"  {name:16s} {row['paper_bits']:.3f} bits {row['sqnr_db']:6.2f} ± {row['standard_error']:.2f} dB"
        for mine, others in found["differences"].items():
            d = others.get(name)
            text += f"   {mine} - it {d['mean_db']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]" if d else ""
        print(text, flush=True)


def main() -> None:
    arguments = parse()
    progress = ConsoleProgress()
    arguments.run.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {}

    def put(name: str, found: object) -> None:
        results[name] = found
        arguments.out.write_text(json.dumps(results, indent=1))

    for formats in arguments.formats:
        bench = open_bench(arguments, formats, progress)
        if arguments.published:
            put(f"published preset, {formats}", published(bench, arguments.seeds[0]))
            print(json.dumps(results[f"published preset, {formats}"]), flush=True)
            continue
        first = {}
        for seed in arguments.seeds:
            found, predictor = quality_of_predictor(bench, seed)
            put(f"predictor, {formats}, seed {seed}", found)
            show_quality(found)
            for bits in arguments.bits or BUDGETS[formats]:
                title = f"recipes, {formats}, {bits} bits, seed {seed}"
                recipes = recipes_at(bench, seed, bits, predictor)
                put(title, compare(bench, recipes))
                show(title, results[title])
                first.setdefault(bits, recipes)
        if not arguments.no_curve:
            put(f"learning curve, {formats}", learning_curve(bench, arguments.seeds[0]))
        for bits, recipes in first.items() if arguments.images else ():
            title = f"FID, {formats}, {bits} bits, seed {arguments.seeds[0]}"
            put(title, distances(bench, recipes, arguments.images))
            print(title, json.dumps(results[title]), flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", default="zoo:cifar-dit")
    parser.add_argument("--run", type=Path, default=Path("runs/predictor"))
    parser.add_argument("--out", type=Path, default=Path("runs/predictor.json"))
    parser.add_argument("--formats", nargs="*", default=["paper", "wide"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--bits", type=float, nargs="*", help="budgets; default: those of the formats")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--published", action="store_true", help="only the preset paper on the same recipes")
    parser.add_argument("--no-curve", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
