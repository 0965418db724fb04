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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

import sedimo
from sedimo.api.attributing import predictor_table
from sedimo.api.finals import hold_finals
from sedimo.api.order import BudgetOrder
from sedimo.api.predicting import Known, judge, know, measures_of, training_set
from sedimo.api.probing import AblationOptions, attribute_measured, probe
from sedimo.api.search_order import SearchOrder
from sedimo.api.searching import Measuring, Search, allocated, build, keeps, search
from sedimo.cli.console import ConsoleProgress
from sedimo.codec import to_plain
from sedimo.measurement.exploration import Exploration, random_recipe_near
from sedimo.measurement.study import Study
from sedimo.measurement.target import Target
from sedimo.metrics.signal import paired_difference, summarize
from sedimo.sensitivity.error import error_table
from sedimo.sensitivity.gnn.scoring import hop_qualities, option_scores
from sedimo.sensitivity.gnn.training import FAST, PAPER, train_predictor

BUDGETS = {"paper": (3.3, 3.5, 3.7, 4.0), "wide": (3.5, 4.0, 4.5, 5.0)}
RANGES = {"paper": (3.0, 4.5), "wide": (3.0, 5.0)}
BAND = {"paper": 3.5, "wide": 4.0}
N_TRIALS, N_EXTRA, N_ROUNDS = 300, 60, 3
CURVE = (50, 100, 200, 300, 500)
QUALITIES = ("srcc", "kendall_tau", "ndcg_at_10", "mae")
TARGET = Target.parse("sqnr_db")


@dataclass(frozen=True)
class Bench:
    """One set of formats."""

    pipe: object
    sampled: object  # the same pipeline in the dtype of the trials
    bank: object
    known: Known
    study: Study
    formats: str
    progress: ConsoleProgress

    def on(self, first: int, n: int, n_steps: int, objective: str = "final_latents") -> Measuring:
        """Measuring on seeds `first` to `first + n`."""
        plan = self.sampled.default_sampling(range(first, first + n), n_steps)
        return Measuring.on(self.sampled, self.bank, self.study, plan, objective=objective, progress=self.progress)


def open_bench(pipes, formats: str, run: Path, progress: ConsoleProgress, study: Study) -> Bench:
    """Bank and prior, of a pipeline in float32 and in the dtype of the trials."""
    pipe, sampled = pipes
    graph = sedimo.trace(pipe)
    bank = sedimo.fit(pipe, sedimo.search_space(graph, formats), cache=run / "bank", progress=progress)
    plan = pipe.default_sampling(range(8), 10)
    known = know(pipe, graph, bank, study, sampling=plan, progress=progress)
    return Bench(pipe, sampled, bank, known, study, formats, progress)


def exploration_of(bench: Bench, seed: int) -> Exploration:
    """The random recipes of a seed of the method."""
    low, high = RANGES[bench.formats]
    return Exploration(seed, bench.known.space, "stratified", low, high)


def near_recipes(bench: Bench) -> list[object]:
    """The further recipes in the band, which no predictor is trained on."""
    space = bench.known.space
    return [random_recipe_near(space, BAND[bench.formats], 99, i, tolerance=0.05) for i in range(N_EXTRA)]


def quality_of_predictor(bench: Bench, seed: int) -> tuple[dict[str, object], object, object]:
    """The predictor beside its rivals; returns it and its training set."""
    begin = time.perf_counter()
    on_search = bench.on(0, 8, 10)
    exploration = exploration_of(bench, seed)
    trials = on_search.trials([exploration.recipe(i) for i in range(N_TRIALS)])
    measured_seconds = time.perf_counter() - begin
    near = near_recipes(bench)
    extra = on_search.trials(near)
    data = training_set(bench.known, trials, TARGET)
    begin = time.perf_counter()
    predictor = train_predictor(data, FAST, progress=bench.progress)
    seconds = time.perf_counter() - begin
    codes, truth = extra_set(bench, extra)
    bits = BAND[bench.formats]
    report = judge(predictor, data, bench.known, extra=(codes, truth), band=(bits - 0.25, bits + 0.25))
    other = [measures_of(t, bench.known.space)["sqnr_db"] for t in bench.on(500, 8, 10).trials(near)]
    found = {
        "measured_seconds_if_new": measured_seconds,
        "training_seconds": seconds,
        "epochs": [fold.n_epochs for fold in predictor.folds],
        "hop_srcc": np.mean([fold.hop_srcc for fold in predictor.folds], axis=0).tolist(),
        "noise_ceiling_srcc": float(stats.spearmanr(truth, other).statistic),
        "rows": [
            {
                "predictor": n,
                "subset": s,
                **{k: to_plain(getattr(q, k)) for k in QUALITIES},
            }
            for n, s, q in report.rows
        ],
        "ahead_of": {f"{n} | {s}": to_plain(d) for (n, s), d in report.differences.items()},
    }
    return found, predictor, data


def extra_set(bench: Bench, trials) -> tuple[np.ndarray, np.ndarray]:
    """Codes and SQNR of further recipes."""
    space = bench.known.space
    return (
        bench.known.choices.codes([t.recipe for t in trials]),
        np.array([measures_of(t, space)["sqnr_db"] for t in trials]),
    )


def learning_curve(bench: Bench, seed: int) -> list[dict[str, float]]:
    """SRCC on the extra recipes by number of trials."""
    on_search, exploration = bench.on(0, 8, 10), exploration_of(bench, seed)
    trials = on_search.trials([exploration.recipe(i) for i in range(max(CURVE))])
    near = near_recipes(bench)
    codes, truth = extra_set(bench, on_search.trials(near))
    found = []
    for n in CURVE:
        data = training_set(bench.known, trials[:n], TARGET)
        predictor = train_predictor(data, FAST)
        base = np.mean([fold.noise.predict(codes) for fold in predictor.folds], axis=0)
        srcc = float(stats.spearmanr(predictor.predict(codes), truth).statistic)
        found.append({"trials": n, "srcc": srcc, "srcc_without_graph": float(stats.spearmanr(base, truth).statistic)})
        print(found[-1], flush=True)
    return found


def published(bench: Bench, seed: int) -> dict[str, object]:
    """The preset `paper` on the same recipes: how it ranks, and its recipe by calibrated scores, measured."""
    on_search, known, bits = bench.on(0, 8, 10), bench.known, BAND[bench.formats]
    trials = on_search.trials([exploration_of(bench, seed).recipe(i) for i in range(N_TRIALS)])
    data, extra = training_set(known, trials, TARGET), extra_set(bench, on_search.trials(near_recipes(bench)))
    begin = time.perf_counter()
    predictor = train_predictor(data, PAPER, progress=bench.progress)
    seconds = time.perf_counter() - begin
    scores = option_scores(predictor, hop_qualities(predictor, known.graph, data.codes))
    table, _ = predictor_table(known, predictor, data, scores, (1.0, True))
    recipe = allocated(table, BudgetOrder(bits=bits)).recipe
    report = judge(predictor, data, known, extra=extra)
    rows = {s: to_plain(q.srcc) for n, s, q in report.rows if n == "this predictor"}
    return {
        "training_seconds": seconds,
        "epochs": [fold.n_epochs for fold in predictor.folds],
        "srcc": rows,
        "recipe": to_plain(summarize(bench.on(1000, 64, 20).trials([recipe])[0].powers)),
    }


def recipes_at(bench: Bench, seed: int, bits: float, predictor, data) -> dict[str, object]:
    """One shot, refined, and what needs no search, at one budget."""
    budget = BudgetOrder(bits=bits)
    on_search, on_finals, selection = bench.on(0, 8, 10), bench.on(4000, 32, 10), bench.on(3000, 16, 20)
    refined = search(bench.known, on_search, SearchOrder(N_TRIALS, N_ROUNDS, seed), budget)
    table, allocation = build(bench.known, predictor, data, budget, confidence=1.0)
    random = on_search.trials([exploration_of(bench, seed).recipe(i) for i in range(N_TRIALS)])
    one_shot = Search(table, allocation, predictor, data, random, (), N_TRIALS)
    final, first = (hold_finals(bench.known, found, budget, on_finals) for found in (refined, one_shot))
    near = (max(2.2, bits - 0.5), bits + 1.0)
    plan = bench.pipe.default_sampling(range(8), 10)
    probed = probe(
        bench.sampled,
        bench.bank,
        "ablation",
        store=bench.study,
        sampling=plan,
        ablation=AblationOptions(near_bits=near),
        progress=bench.progress,
    )
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
        "ablation": allocated(attribute_measured(probed), budget).recipe,
        "error": allocated(error_table(space, bench.known.candidates.values()), budget).recipe,
        "best uniform": best_of(selection, [u for u in uniform if space.paper_bits(u) <= bits + 0.1]),
        "best random": best_of(selection, [t.recipe for t in within[:5]]),
    }


def best_of(measuring: Measuring, recipes):
    """The best on seeds that the figures do not use."""
    return max(measuring.trials(recipes), key=lambda t: t.score).recipe


def compare(bench: Bench, recipes: dict[str, object]) -> dict[str, object]:
    """SQNR on fresh seeds, and the refined recipe minus each other one, paired."""
    trials = dict(zip(recipes, bench.on(1000, 64, 20).trials(list(recipes.values())), strict=True))
    space = bench.known.space
    rows = {
        n: {
            "paper_bits": space.paper_bits(recipes[n]),
            "stored_bits": 8 * bench.bank.stored_bytes(recipes[n]) / space.params,
            **to_plain(summarize(t.powers)),
        }
        for n, t in trials.items()
    }
    differences = {
        mine: {n: to_plain(paired_difference(trials[mine].powers, t.powers)) for n, t in trials.items() if n != mine}
        for mine in ("gnn, one shot", "gnn, refined")
    }
    return {"rows": rows, "differences": differences}


def show_quality(found: dict[str, object]) -> None:
    """What the predictor reaches beside its rivals, on the screen."""
    print(json.dumps({k: v for k, v in found.items() if k not in ("rows", "ahead_of")}), flush=True)
    for row in found["rows"]:
        interval = f"[{row['srcc']['low']:.3f}, {row['srcc']['high']:.3f}]"
        print(f"  {row['subset']:26s} {row['predictor']:26s} SRCC {row['srcc']['value']:.3f} {interval}", flush=True)


def distances(bench: Bench, recipes: dict[str, object], n_images: int) -> dict[str, object]:
    """FID of recipes, and their difference to full precision on the same seeds."""
    recipes = {name: recipe for name, recipe in recipes.items() if not name.endswith("no final")}
    trials = bench.on(100_000, n_images, 10, "fid").trials(list(recipes.values()))
    return {
        name: {"sqnr_db": summarize(trial.powers).sqnr_db, **{k: to_plain(v) for k, v in trial.measures.items()}}
        for name, trial in zip(recipes, trials, strict=True)
    }


def show(title: str, found: dict[str, object]) -> None:
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
    pipes = (sedimo.load(arguments.source), sedimo.load(arguments.source, dtype=arguments.dtype))
    arguments.run.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {}

    def put(name: str, found: object) -> None:
        results[name] = found
        arguments.out.write_text(json.dumps(results, indent=1))

    for formats in arguments.formats:
        with Study(arguments.run / formats) as study:
            bench = open_bench(pipes, formats, arguments.run, progress, study)
            if arguments.published:
                put(f"published preset, {formats}", published(bench, arguments.seeds[0]))
                print(json.dumps(results[f"published preset, {formats}"]), flush=True)
                continue
            first = {}
            for seed in arguments.seeds:
                found, predictor, data = quality_of_predictor(bench, seed)
                put(f"predictor, {formats}, seed {seed}", found)
                show_quality(found)
                for bits in arguments.bits or BUDGETS[formats]:
                    title = f"recipes, {formats}, {bits} bits, seed {seed}"
                    recipes = recipes_at(bench, seed, bits, predictor, data)
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
