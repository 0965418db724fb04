"""Fixed against mixed precision at equal and at 16.5 % more bytes, by FID: the setting of MPQ-Diff's headline.

    python benchmarks/mixed_precision.py [--source zoo:cifar-dit] [--fixed uaq4a8] [--weights LIST] [--images 500]

The fixed recipe has one format everywhere. The mixed ones choose among uaq of 2, 3, 4, 5, 6 and 8 bits (or --weights:
uaq4,uaq5,uaq6,uaq8 gives no layer less than the fixed recipe does) with the same activations (dynamic), in the paper
bits of the fixed recipe, and in 16.5 % more: by network orthogonality with the published linear programme (`lp`) and
exactly, by its importances times weight noise (ours), and by first-order noise. SQNR and FID of the same images for
all; FID minus that of full precision, SQNR minus that of the fixed recipe.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import sedimo
from _suite.signal import summarize
from sedimo.cli.console import ConsoleProgress
from sedimo.codec import to_plain
from sedimo.lab.bench import Compute
from sedimo.methods.orthogonality import LEAST_SAMPLES, ImportanceOptions
from sedimo.metrics.signal import paired_difference
from sedimo.quant.formats import parse_formats, with_activations

MORE = (1.0, 1.165)
FIRST_IMAGE = 100_000


def recipes_of(lab: sedimo.Lab, fixed: sedimo.Recipe) -> dict[str, sedimo.Recipe]:
    """The fixed recipe and the mixed ones by name."""
    wide = lab.sampled(sedimo.SamplingSettings(n_seeds=LEAST_SAMPLES))

    def orthogonality(**knobs: object) -> sedimo.SensitivityTable:
        return wide.table("orthogonality", knobs=ImportanceOptions(**knobs))

    tables = {
        "orthogonality, published programme": (orthogonality(tail_mean=True), "lp"),
        "orthogonality, exact": (orthogonality(), "milp"),
        "orthogonality x noise": (orthogonality(objective="noise"), "milp"),
        "jacobian": (lab.table("jacobian"), "milp"),
    }
    found = {"fixed": fixed}
    for more in MORE:
        bits = lab.bank.space.paper_bits(fixed) * more * (1 + 1e-12)
        for name, (table, rule) in tables.items():
            found[f"{name}, {more - 1:+.1%}"] = sedimo.allocate(table, bits=bits, rule=rule).recipe
    return found


def main() -> None:
    """Prints a line per recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="zoo:cifar-dit")
    parser.add_argument("--fixed", default="uaq4a8")
    parser.add_argument("--weights", default="uaq2,uaq3,uaq4,uaq5,uaq6,uaq8")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--run", type=Path, default=Path("runs/mixed"))
    parser.add_argument("--out", type=Path, default=Path("runs/mixed.json"))
    options = parser.parse_args()
    number_format = sedimo.Format.parse(options.fixed)
    formats = with_activations(parse_formats(options.weights), (number_format.activation_bits,))
    lab = sedimo.Lab(
        options.source,
        store=options.run,
        formats=",".join(map(str, formats)),
        compute=Compute(options.dtype),
        progress=ConsoleProgress(),
    ).fitted
    space = lab.bank.space
    recipes = recipes_of(lab, space.uniform(number_format))
    plan = lab.pipe.default_sampling(range(FIRST_IMAGE, FIRST_IMAGE + options.images), options.steps)
    trials = dict(zip(recipes, lab.measure(list(recipes.values()), plan, objective="fid"), strict=True))
    results, fixed = {}, trials["fixed"]
    for name, trial in trials.items():
        ahead, fid = paired_difference(trial.powers, fixed.powers).estimate, trial.measures["fid_difference"]
        bits = space.paper_bits(trial.recipe)
        results[name] = {
            "paper_bits": bits,
            **to_plain(summarize(trial.powers)),
            "ahead_of_fixed": to_plain(ahead),
            **{key: to_plain(value) for key, value in trial.measures.items()},
        }
        print(
            f"{name:42s} {bits:.3f} bits {results[name]['sqnr_db']:6.2f} dB, minus fixed {ahead.value:+.2f} "
            f"[{ahead.low:+.2f}, {ahead.high:+.2f}]; FID {trial.measures['fid'].value:.3f}, minus full precision "
            f"{fid.value:+.3f} [{fid.low:+.3f}, {fid.high:+.3f}]",
            flush=True,
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
