"""Do the methods find better recipes than uniform, random and plain weight error? Paired, on fresh seeds.

    python benchmarks/recipes.py [--source zoo:cifar-dit] [--run runs/recipes] [--out results.json]

Searches on 8 seeds x 10 steps, measures on 64 fresh seeds x 20 steps (arguments), saves every trial in the
study under --run: a killed run goes on. With --images N, FID and KID of the best recipe at --fid-bits.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import sedimo
from sedimo.api.additivity import check_additivity, measure_random_recipes
from sedimo.api.evaluation import compare_distributions, draw_features
from sedimo.api.probing import AblationOptions, measure_probes
from sedimo.cli.console import ConsoleProgress
from sedimo.codec import to_plain
from sedimo.measurement.campaign import run_trials
from sedimo.measurement.exploration import random_recipe_near
from sedimo.measurement.probe import Prober
from sedimo.measurement.study import Study
from sedimo.measurement.worker import TrialWorker, setting_of
from sedimo.metrics.signal import paired_difference, summarize
from sedimo.sensitivity.ablation import check_scaling, plan_checks
from sedimo.sensitivity.combine import geometric_mean

N_RANDOM = 20
FID_DTYPE = "bf16"  # both sides; three times as fast as float32 on processors that know it
AGREEMENT = ("n", "slope", "slope_standard_error", "ratio", "srcc")


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    source: str
    pipe: object
    graph: object
    run: Path
    study: Study
    search: object
    fresh: object
    progress: ConsoleProgress


def measured(bench: Bench, bank, recipes, sampling):
    """Trials of recipes under a plan."""
    return run_trials(
        bench.study,
        recipes,
        setting=setting_of(bench.pipe, sampling, weights_digest=bank.weights_digest),
        make_worker=lambda: TrialWorker(bench.pipe, bank, sampling, objective="final_latents"),
        progress=bench.progress,
    )


def tables_of(bench: Bench, bank, bits: float):
    """Tables of all methods, probed near `bits`."""
    near = AblationOptions(near_bits=(max(2.2, bits - 0.5), bits + 1.0))
    common = {"store": bench.study, "sampling": bench.search, "progress": bench.progress}
    ablation = sedimo.attribute(sedimo.probe(bench.pipe, bank, "ablation", ablation=near, **common))
    jacobian = sedimo.attribute(sedimo.probe(bench.pipe, bank, "jacobian", **common))
    return {
        "error": sedimo.attribute(bank),
        "ablation": ablation,
        "jacobian": jacobian,
        "combined": geometric_mean(ablation, jacobian),
    }


def bank_of(bench: Bench, formats: str):
    """Bank of a set of formats."""
    space = sedimo.search_space(bench.graph, formats)
    return sedimo.fit(bench.pipe, space, cache=bench.run / "bank", progress=bench.progress)


def compare(bench: Bench, bank, tables, bits: float, *, rivals: bool) -> dict[str, object]:
    """SQNR of each method's recipe at `bits`, and of uniform and random ones, on fresh seeds."""
    space = bank.space
    recipes = {name: sedimo.allocate(table, bits=bits).recipe for name, table in tables.items()}
    if rivals:
        common = set.intersection(*(set(d.formats) for d in space.decisions))
        uniform = {f"uniform {f}": space.uniform(f) for f in sorted(common, key=str) if f.is_quantized}
        recipes |= {n: r for n, r in uniform.items() if space.paper_bits(r) <= bits + 0.1}
        randoms = [random_recipe_near(space, bits, seed=1, index=i) for i in range(N_RANDOM)]
        recipes |= {f"random {i}": r for i, r in enumerate(randoms)}
    trials = dict(zip(recipes, measured(bench, bank, list(recipes.values()), bench.fresh), strict=True))
    best = max((n for n in tables if n != "error"), key=lambda n: summarize(trials[n].powers).sqnr_db)
    rows = {
        name: {
            "paper_bits": space.paper_bits(recipes[name]),
            "stored_bits": 8 * bank.stored_bytes(recipes[name]) / space.params,
            **to_plain(summarize(trial.powers)),
        }
        for name, trial in trials.items()
    }
    against = {
        n: to_plain(paired_difference(trials["ablation"].powers, t.powers))
        for n, t in trials.items()
        if n != "ablation"
    }
    return {"bits": bits, "rows": rows, "ablation_minus": against, "best": best}


def show(title: str, found: dict[str, object]) -> None:
    """A table of a comparison; of the random recipes the best and the median."""
    rows = found["rows"]
    randoms = sorted((n for n in rows if n.startswith("random")), key=lambda n: -rows[n]["sqnr_db"])
    shown = [n for n in rows if not n.startswith("random")] + randoms[:1] + randoms[len(randoms) // 2 :][:1]
    print(f"\n{title}")
    for name in shown:
        row, d = rows[name], found["ablation_minus"].get(name)
        paired = f"ablation - it {d['mean_db']:+6.2f} [{d['low']:+.2f}, {d['high']:+.2f}]" if d else ""
        print(
            f"  {name:18s} {row['paper_bits']:.3f} paper {row['stored_bits']:.3f} stored bits  "
            f"{row['sqnr_db']:6.2f} ± {row['standard_error']:.2f} dB  {paired}"
        )


def checks(bench: Bench, bank, tables, bits: float) -> dict[str, object]:
    """Additivity on 30 random recipes, and the scaling of the ablation on 24 pairs that were not probed."""
    trials = measure_random_recipes(bench.pipe, bank, bench.study, bits, (bench.search, bench.progress))
    found: dict[str, object] = {}
    for name, table in tables.items():
        agreed = check_additivity(table, trials)
        found[name] = {k: getattr(agreed, k) for k in AGREEMENT}
    pairs = plan_checks(bank.space, bank.candidates, (), n=24)
    probes = measure_probes(bench.pipe, bank, bench.study, pairs, (bench.search, bench.progress))
    scaled = check_scaling(tables["ablation"], probes)
    found["scaling of the ablation"] = {
        k: to_plain(scaled)[k] for k in ("n", "slope", "slope_standard_error", "ratio", "srcc")
    }
    return found


def distributions(bench: Bench, bank, recipe, n_images: int) -> dict[str, object]:
    """FID and KID of a recipe beside full precision."""
    plan = bench.pipe.default_sampling(range(100_000, 100_000 + n_images), 10)
    pipe = sedimo.load(bench.source, dtype=FID_DTYPE)
    full = draw_features(pipe, plan, label="full precision", progress=bench.progress)
    with Prober(pipe.denoiser, bank.quantize) as prober:
        prober.switch(recipe)
        small = draw_features(pipe, plan, label="recipe", progress=bench.progress)
    return to_plain(compare_distributions(full, small))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", default="zoo:cifar-dit")
    parser.add_argument("--run", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--out", type=Path, default=Path("runs/recipes.json"))
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--wide-bits", default="3.3,3.5,4.0,4.5,5.0,6.0")
    parser.add_argument("--images", type=int, default=0)
    arguments = parser.parse_args()
    pipe = sedimo.load(arguments.source)
    search = pipe.default_sampling(range(8), 10)
    fresh = pipe.default_sampling(range(1000, 1000 + arguments.seeds), arguments.steps)
    arguments.run.mkdir(parents=True, exist_ok=True)
    with Study(arguments.run) as study:
        bench = Bench(
            arguments.source, pipe, sedimo.trace(pipe), arguments.run, study, search, fresh, ConsoleProgress()
        )
        paper = bank_of(bench, "paper")
        tables = tables_of(bench, paper, 3.5)
        results = {"paper 3.5": compare(bench, paper, tables, 3.5, rivals=True)}
        show("formats paper, 3.5 paper bits", results["paper 3.5"])
        results["checks paper 3.5"] = checks(bench, paper, tables, 3.5)
        print(json.dumps(results["checks paper 3.5"], indent=1))
        results["paper 4.0"] = compare(bench, paper, tables_of(bench, paper, 4.0), 4.0, rivals=False)
        show("formats paper, 4.0 paper bits", results["paper 4.0"])
        wide = bank_of(bench, "wide")
        for bits in map(float, arguments.wide_bits.split(",")):
            key = f"wide {bits}"
            results[key] = compare(bench, wide, tables_of(bench, wide, bits), bits, rivals=False)
            show(f"formats wide, {bits} paper bits", results[key])
            arguments.out.write_text(json.dumps(results, indent=1))
        if arguments.images:
            recipe = sedimo.allocate(tables["ablation"], bits=3.5).recipe
            results["distributions"] = distributions(bench, paper, recipe, arguments.images)
            print(json.dumps(results["distributions"], indent=1))
    arguments.out.write_text(json.dumps(results, indent=1))
    print(f"\nwritten to {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
