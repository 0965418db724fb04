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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import sedimo
from _suite.signal import summarize
from sedimo.allocation.budget import BudgetSettings
from sedimo.allocation.combine import geometric_mean
from sedimo.cli.console import ConsoleProgress
from sedimo.codec import to_plain
from sedimo.jobs.check import check_additivity, measure_random_recipes
from sedimo.lab.exchange import Prober
from sedimo.lab.exploration import random_recipe_near
from sedimo.lab.images import compare_distributions, draw_latents_and_features
from sedimo.methods.ablation import (
    Probe,
    ablation_table,
    check_scaling,
    measure_probes,
    near_bits,
    plan_checks,
    plan_probes,
)
from sedimo.methods.jacobian import jacobian_table, probe_jacobian
from sedimo.methods.method import NO_KNOBS, Task
from sedimo.metrics.signal import paired_difference
from sedimo.pipelines.adapter import Sampling

N_RANDOM = 20
N_RECIPES = 30  # that show whether costs add
FID_DTYPE = "bf16"  # both sides; three times as fast as float32 on processors that know it
AGREEMENT = ("n", "slope", "slope_standard_error", "ratio", "srcc")


Recipes = Mapping[str, sedimo.Recipe]
Tables = Mapping[str, sedimo.SensitivityTable]


@dataclass(frozen=True)
class Bench:
    """What all parts share; `paper` and `wide` are labs of those formats, every format fitted in full."""

    source: str
    run: Path
    n_seeds: int
    n_steps: int
    progress: ConsoleProgress

    @cached_property
    def paper(self) -> sedimo.Lab:
        """The four formats that papers compare."""
        return sedimo.Lab(self.source, store=self.run, formats="paper", progress=self.progress).fitted

    @cached_property
    def wide(self) -> sedimo.Lab:
        """The formats that Sedimo chooses among, in the same study."""
        found = self.paper.decided_on(sedimo.search_space(self.paper.graph, "wide"))
        return found.fitted

    @property
    def selection(self) -> Sampling:
        """Seeds that rivals are ranked on."""
        return self.paper.pipe.default_sampling(range(3000, 3016), self.n_steps)

    @property
    def fresh(self) -> Sampling:
        """Seeds of the figures."""
        return self.paper.pipe.default_sampling(range(1000, 1000 + self.n_seeds), self.n_steps)


def tables_of(lab: sedimo.Lab, bits: float) -> tuple[Tables, Sequence[Probe]]:
    """Tables of all methods, probed near `bits`; and the probes of the ablation."""
    bank, budget = lab.bank, BudgetSettings(bits=bits)
    probes = plan_probes(bank.space, bank.candidates, near_bits=near_bits(lab, Task(NO_KNOBS, budget)))
    ablation = ablation_table(bank.space, bank.candidates, measure_probes(lab, lab.seeds.search, probes))
    jacobian, apart = lab.table("jacobian"), jacobian_apart(lab)
    tables = {
        "combined": geometric_mean(ablation, jacobian),
        "jacobian": jacobian,
        "ablation": ablation,
        "error": lab.table("error"),
        "combined, rows apart": geometric_mean(ablation, apart),
        "jacobian, rows apart": apart,
    }
    return tables, probes


def jacobian_apart(lab: sedimo.Lab) -> sedimo.SensitivityTable:
    """The table of first-order noise, each guided row for itself, not together as the sampler does."""
    probe = probe_jacobian(lab, lab.seeds.search, combine_rows=False)
    return jacobian_table(lab.bank.space, lab.bank.candidates, probe)


def rivals_of(bench: Bench, lab: sedimo.Lab, bits: float) -> Recipes:
    """Uniform recipes of at most `bits` + 0.1, and the best and the median of 20 random ones.

    Which ones are the best is decided on seeds that the figures do not use.
    """
    space = lab.bank.space
    every = {f"uniform {f}": space.uniform(f) for f in space.common_formats}
    uniform = {n: r for n, r in every.items() if space.paper_bits(r) <= bits + 0.1}
    random = {f"random {i}": random_recipe_near(space, bits, seed=1, index=i) for i in range(N_RANDOM)}
    drawn = {**uniform, **random}
    trials = dict(zip(drawn, lab.measure(list(drawn.values()), bench.selection), strict=True))
    order = sorted(drawn, key=lambda n: -summarize(trials[n].powers).sqnr_db)
    ranked = [n for n in order if n in random]
    first = next(n for n in order if n in uniform)
    named = {f"{n}{', the best of them' if n == first else ''}": r for n, r in uniform.items()}
    best, median = random[ranked[0]], random[ranked[len(ranked) // 2]]
    return {**named, f"best of {N_RANDOM} random": best, f"median of {N_RANDOM} random": median}


def compare(
    bench: Bench, lab: sedimo.Lab, tables: Tables, bits: float, rivals: Recipes | None = None
) -> dict[str, object]:
    """SQNR of each method's recipe at `bits`, and of its rivals, on fresh seeds; paired differences of all methods."""
    bank, space = lab.bank, lab.bank.space
    recipes = {name: sedimo.allocate(table, bits=bits).recipe for name, table in tables.items()} | (rivals or {})
    trials = dict(zip(recipes, lab.measure(list(recipes.values()), bench.fresh), strict=True))
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


def show(title: str, found: dict[str, Any]) -> None:
    """A table of a comparison, with the first two methods' paired differences to the others."""
    print(f"\n{title}")
    for name, row in found["rows"].items():
        text = f"  {name:26s} {row['paper_bits']:.3f} paper {row['stored_bits']:.3f} stored bits  "
        text += f"{row['sqnr_db']:6.2f} ± {row['standard_error']:.2f} dB"
        for method in ("combined", "jacobian", "ablation"):
            d = found["differences"].get(method, {}).get(name)
            text += f"  {method} - it {d['mean_db']:+6.2f} [{d['low']:+.2f}, {d['high']:+.2f}]" if d else ""
        print(text, flush=True)


def additivity(lab: sedimo.Lab, tables: Tables, bits: float) -> dict[str, object]:
    """Predicted against measured noise of 30 random recipes."""
    trials = measure_random_recipes(lab, lab.bank.space, bits, n=N_RECIPES)
    agreed = {name: check_additivity(table, trials) for name, table in tables.items()}
    return {name: {k: getattr(one, k) for k in AGREEMENT} for name, one in agreed.items()}


def scaling(lab: sedimo.Lab, table: sedimo.SensitivityTable, probes: Sequence[Probe]) -> dict[str, object]:
    """Measured noise of 24 pairs that the ablation did not probe, against what it was scaled to."""
    pairs = plan_checks(lab.bank.candidates, probes, n=24)
    agreed = check_scaling(table, measure_probes(lab, lab.seeds.search, pairs))
    return {k: getattr(agreed, k) for k in AGREEMENT}


def distributions(bench: Bench, recipe: sedimo.Recipe, n_images: int) -> dict[str, object]:
    """FID and KID of a recipe beside full precision."""
    bank, pipe = bench.paper.bank, sedimo.load(bench.source, dtype=FID_DTYPE)
    plan = pipe.default_sampling(range(100_000, 100_000 + n_images), 10)
    _, full = draw_latents_and_features(pipe, plan, label="full precision", progress=bench.progress)
    with Prober(pipe.denoiser, bank) as prober:
        prober.switch(recipe)
        _, small = draw_latents_and_features(pipe, plan, label="recipe", progress=bench.progress)
    named = {"extractor": full.extractor, "n_images": len(full.values)}
    return to_plain(named | compare_distributions(full, small))


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
    arguments.run.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.source, arguments.run, arguments.seeds, arguments.steps, ConsoleProgress())
    results = Results(arguments.out)
    recipe = measure_paper(bench, results)
    measure_wide(bench, results, arguments)
    if arguments.images:
        results.put("distributions", distributions(bench, recipe, arguments.images))
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


def measure_paper(bench: Bench, results: Results) -> sedimo.Recipe:
    """Formats `paper` at 3.5 and 4.0 bits; the recipe of the ablation at 3.5."""
    lab = bench.paper
    tables, _ = tables_of(lab, 3.5)
    results.put("formats paper, 3.5 bits", compare(bench, lab, tables, 3.5, rivals_of(bench, lab, 3.5)))
    results.put("additivity, formats paper, 3.5 bits", additivity(lab, tables, 3.5))
    results.put("formats paper, 4.0 bits", compare(bench, lab, tables_of(lab, 4.0)[0], 4.0))
    return sedimo.allocate(tables["ablation"], bits=3.5).recipe


def measure_wide(bench: Bench, results: Results, arguments: argparse.Namespace) -> None:
    """Formats `wide`, and beside them the same methods with formats `paper` at 4.0 bits."""
    lab = bench.wide
    for bits in arguments.wide_bits:
        tables, probes = tables_of(lab, bits)
        narrow = {
            f"{n}, formats paper": sedimo.allocate(t, bits=bits).recipe
            for n, t in tables_of(bench.paper, bits)[0].items()
        }
        results.put(f"formats wide, {bits} bits", compare(bench, lab, tables, bits, narrow))
        results.put(f"scaling of the ablation, wide, {bits} bits", scaling(lab, tables["ablation"], probes))
    for bits in arguments.jacobian_bits:
        results.put(f"formats wide, {bits} bits", compare(bench, lab, {"jacobian": lab.table("jacobian")}, bits))


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
