"""Do the methods find better recipes than uniform, random and plain weight error? Paired, on fresh seeds.

    python benchmarks/recipes.py [--source zoo:cifar-dit] [--run runs/recipes] [--out results.json]

Searches on 8 seeds x 10 steps, ranks random and uniform recipes on 16 other seeds, measures on 64 fresh seeds x 20
steps (arguments), saves every trial in the study under --run: a killed run goes on. With --images N, FID and
KID of the ablation's recipe at 3.5 bits, formats paper.
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
from sedimo.api.probing import AblationOptions, measure_probes
from sedimo.cli.console import ConsoleProgress
from sedimo.codec import to_plain
from sedimo.measurement.campaign import run_trials
from sedimo.measurement.exploration import random_recipe_near
from sedimo.measurement.images import compare_distributions, draw_features
from sedimo.measurement.jacobian import JacobianOptions, probe_jacobian
from sedimo.measurement.probe import Prober
from sedimo.measurement.study import Study
from sedimo.measurement.worker import TrialWorker, setting_of
from sedimo.metrics.signal import paired_difference, summarize
from sedimo.sensitivity.ablation import check_scaling, plan_checks
from sedimo.sensitivity.combine import geometric_mean
from sedimo.sensitivity.jacobian import jacobian_table

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
    selection: object
    fresh: object
    progress: ConsoleProgress


def measured(bench: Bench, bank, recipes, sampling):
    """Trials of recipes under a plan."""
    return run_trials(
        bench.study,
        recipes,
        setting=setting_of(bench.pipe, sampling, weights_digest=bank.digest),
        make_worker=lambda: TrialWorker(bench.pipe, bank, sampling, objective="final_latents"),
        progress=bench.progress,
    )


def ablation_near(bits: float) -> AblationOptions:
    """Probes around a budget, as the main job plans them."""
    return AblationOptions(near_bits=(max(2.2, bits - 0.5), bits + 1.0))


def tables_of(bench: Bench, bank, bits: float):
    """Tables of all methods, probed near `bits`; and the probes of the ablation."""
    common = {"store": bench.study, "sampling": bench.search, "progress": bench.progress}
    probed = sedimo.probe(bench.pipe, bank, "ablation", ablation=ablation_near(bits), **common)
    ablation = sedimo.attribute(probed)
    jacobian, apart = jacobian_of(bench, bank), jacobian_of(bench, bank, combine_rows=False)
    tables = {
        "combined": geometric_mean(ablation, jacobian),
        "jacobian": jacobian,
        "ablation": ablation,
        "error": sedimo.attribute(bank),
        "combined, rows apart": geometric_mean(ablation, apart),
        "jacobian, rows apart": apart,
    }
    return tables, [one.probe for one in probed.ablation]


def jacobian_of(bench: Bench, bank, *, combine_rows: bool = True):
    """The table of first-order noise, guided rows taken together as the sampler does, or each for itself."""
    options = JacobianOptions(combine_rows=combine_rows)
    probe = probe_jacobian(bench.pipe, bank, bench.search, study=bench.study, options=options, progress=bench.progress)
    return jacobian_table(bank.space, bank.candidates, probe)


def bank_of(bench: Bench, formats: str):
    """Bank of a set of formats."""
    space = sedimo.search_space(bench.graph, formats)
    return sedimo.fit(bench.pipe, space, cache=bench.run / "bank", progress=bench.progress)


def rivals_of(bench: Bench, bank, bits: float) -> dict[str, object]:
    """Uniform recipes of at most `bits` + 0.1, and the best and the median of 20 random ones.

    Which ones are the best is decided on seeds that the figures do not use.
    """
    space = bank.space
    every = {f"uniform {f}": space.uniform(f) for f in space.common_formats}
    uniform = {n: r for n, r in every.items() if space.paper_bits(r) <= bits + 0.1}
    random = {f"random {i}": random_recipe_near(space, bits, seed=1, index=i) for i in range(N_RANDOM)}
    drawn = {**uniform, **random}
    trials = dict(zip(drawn, measured(bench, bank, list(drawn.values()), bench.selection), strict=True))
    order = sorted(drawn, key=lambda n: -summarize(trials[n].powers).sqnr_db)
    ranked = [n for n in order if n in random]
    first = next(n for n in order if n in uniform)
    named = {f"{n}{', the best of them' if n == first else ''}": r for n, r in uniform.items()}
    best, median = random[ranked[0]], random[ranked[len(ranked) // 2]]
    return {**named, f"best of {N_RANDOM} random": best, f"median of {N_RANDOM} random": median}


def compare(bench: Bench, bank, tables, bits: float, rivals=None) -> dict[str, object]:
    """SQNR of each method's recipe at `bits`, and of its rivals, on fresh seeds; paired differences of all methods."""
    space = bank.space
    recipes = {name: sedimo.allocate(table, bits=bits).recipe for name, table in tables.items()} | (rivals or {})
    trials = dict(zip(recipes, measured(bench, bank, list(recipes.values()), bench.fresh), strict=True))
    rows = {
        name: {
            "paper_bits": space.paper_bits(recipes[name]),
            "stored_bits": 8 * bank.stored_bytes(recipes[name]) / space.params,
            **to_plain(summarize(trial.powers)),
        }
        for name, trial in trials.items()
    }
    differences = {
        method: {
            n: to_plain(paired_difference(trials[method].powers, t.powers)) for n, t in trials.items() if n != method
        }
        for method in tables
    }
    return {"bits": bits, "rows": rows, "differences": differences}


def show(title: str, found: dict[str, object]) -> None:
    """A table of a comparison, with the first two methods' paired differences to the others."""
    print(f"\n{title}")
    for name, row in found["rows"].items():
        text = f"  {name:26s} {row['paper_bits']:.3f} paper {row['stored_bits']:.3f} stored bits  "
        text += f"{row['sqnr_db']:6.2f} ± {row['standard_error']:.2f} dB"
        for method in ("combined", "jacobian", "ablation"):
            d = found["differences"].get(method, {}).get(name)
            text += f"  {method} - it {d['mean_db']:+6.2f} [{d['low']:+.2f}, {d['high']:+.2f}]" if d else ""
        print(text, flush=True)


def additivity(bench: Bench, bank, tables, bits: float) -> dict[str, object]:
    """Predicted against measured noise of 30 random recipes."""
    trials = measure_random_recipes(bench.pipe, bank, bench.study, bits, (bench.search, bench.progress))
    agreed = {name: check_additivity(table, trials) for name, table in tables.items()}
    return {name: {k: getattr(one, k) for k in AGREEMENT} for name, one in agreed.items()}


def scaling(bench: Bench, bank, table, probes) -> dict[str, object]:
    """Measured noise of 24 pairs that the ablation did not probe, against what it was scaled to."""
    pairs = plan_checks(bank.space, bank.candidates, probes, n=24)
    agreed = check_scaling(table, measure_probes(bench.pipe, bank, bench.study, pairs, (bench.search, bench.progress)))
    return {k: getattr(agreed, k) for k in AGREEMENT}


def distributions(bench: Bench, bank, recipe, n_images: int) -> dict[str, object]:
    """FID and KID of a recipe beside full precision."""
    plan = bench.pipe.default_sampling(range(100_000, 100_000 + n_images), 10)
    pipe = sedimo.load(bench.source, dtype=FID_DTYPE)
    full = draw_features(pipe, plan, label="full precision", progress=bench.progress)
    with Prober(pipe.denoiser, bank.quantize, bank.input_quantizers) as prober:
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
    parser.add_argument("--wide-bits", type=float, nargs="*", default=[3.5, 4.0], help="all methods, formats wide")
    parser.add_argument("--jacobian-bits", type=float, nargs="*", default=[3.3, 4.5, 5.0, 6.0], help="formats wide")
    parser.add_argument("--images", type=int, default=0)
    arguments = parser.parse_args()
    pipe = sedimo.load(arguments.source)
    plans = {
        "search": pipe.default_sampling(range(8), 10),
        "selection": pipe.default_sampling(range(3000, 3016), arguments.steps),
        "fresh": pipe.default_sampling(range(1000, 1000 + arguments.seeds), arguments.steps),
    }
    arguments.run.mkdir(parents=True, exist_ok=True)
    with Study(arguments.run) as study:
        graph = sedimo.trace(pipe)
        bench = Bench(arguments.source, pipe, graph, arguments.run, study, **plans, progress=ConsoleProgress())
        results = Results(arguments.out)
        recipe = measure_paper(bench, results)
        measure_wide(bench, results, arguments)
        if arguments.images:
            results.put("distributions", distributions(bench, bank_of(bench, "paper"), recipe, arguments.images))
    print(f"\nwritten to {arguments.out}", file=sys.stderr)


class Results:
    """What was found so far, written after each part."""

    def __init__(self, path: Path) -> None:
        self._path, self._found = path, {}

    def put(self, name: str, found: dict[str, object]) -> None:
        """Adds a part and shows it."""
        self._found[name] = found
        self._path.write_text(json.dumps(self._found, indent=1))
        if "rows" in found:
            show(name, found)
        else:
            print(f"\n{name}\n{json.dumps(found, indent=1)}", flush=True)


def measure_paper(bench: Bench, results: Results):
    """Formats `paper` at 3.5 and 4.0 bits; the recipe of the ablation at 3.5."""
    bank = bank_of(bench, "paper")
    tables, _ = tables_of(bench, bank, 3.5)
    results.put("formats paper, 3.5 bits", compare(bench, bank, tables, 3.5, rivals_of(bench, bank, 3.5)))
    results.put("additivity, formats paper, 3.5 bits", additivity(bench, bank, tables, 3.5))
    results.put("formats paper, 4.0 bits", compare(bench, bank, tables_of(bench, bank, 4.0)[0], 4.0))
    return sedimo.allocate(tables["ablation"], bits=3.5).recipe


def measure_wide(bench: Bench, results: Results, arguments: argparse.Namespace) -> None:
    """Formats `wide`, and beside them the same methods with formats `paper` at 4.0 bits."""
    bank, paper = bank_of(bench, "wide"), bank_of(bench, "paper")
    for bits in arguments.wide_bits:
        tables, probes = tables_of(bench, bank, bits)
        narrow = {
            f"{n}, formats paper": sedimo.allocate(t, bits=bits).recipe
            for n, t in tables_of(bench, paper, bits)[0].items()
        }
        results.put(f"formats wide, {bits} bits", compare(bench, bank, tables, bits, narrow))
        results.put(f"scaling of the ablation, wide, {bits} bits", scaling(bench, bank, tables["ablation"], probes))
    for bits in arguments.jacobian_bits:
        results.put(f"formats wide, {bits} bits", compare(bench, bank, {"jacobian": jacobian_of(bench, bank)}, bits))


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
