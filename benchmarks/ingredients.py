"""What each ingredient of the SQNR strategy brings: hybrid precision, smoothing, single-step calibration, and together.

    python benchmarks/ingredients.py [--source zoo:cifar-dit] [--formats uaq8a8,uaq4a8] [--keep 2] [--run DIR]

The base is that of the paper: every layer at one uniform format, activations symmetric with static ranges by extremes
(min-max), here calibrated at all ten steps. Each ingredient is added alone, then all three: `hybrid` leaves the
`--keep` blocks that gain most at 16 bits, weights and activations; `smoothing` is SmoothQuant, alpha 0.7, on the most
sensitive tenth of the layers; `single step` calibrates ranges at the step of greatest noise only. Ranges of each token
or image (dynamic) and the ranges of least squared error stand beside as ours. Printed: SQNR of the final latents on
fresh seeds, and each row minus the base, paired by seed, with its 95 % interval. Results are kept in a study per
formats; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sedimo
from _suite.signal import summarize
from sedimo.cli.console import ConsoleProgress
from sedimo.codec import to_plain
from sedimo.lab.study import Trial
from sedimo.methods.hybrid import blocks_by_gain, hybrid_recipe
from sedimo.metrics.signal import paired_difference
from sedimo.treatments.smoothing import DEFAULT_SMOOTHING, plan_smoothings
from sedimo.treatments.static_ranges import DYNAMIC_ACTIVATIONS, ActivationSettings, round_activations

ALL_STEPS, ONE_STEP = (ActivationSettings("min-max", symmetric=True, n_steps=n) for n in (0, 1))
LEAST_ERROR = ActivationSettings("mse")
N_CALIBRATION, N_RANKING = 64, 8  # samples that ranges come from, and that blocks are ranked on
FRESH_SEED = 1000


@dataclass(frozen=True)
class Row:
    """Which ingredients a row has."""

    name: str
    rules: ActivationSettings = ALL_STEPS
    is_hybrid: bool = False
    is_smoothed: bool = False


ROWS = (
    Row("base: all steps, extremes"),
    Row("hybrid", is_hybrid=True),
    Row("smoothing", is_smoothed=True),
    Row("single step", ONE_STEP),
    Row("hybrid, smoothing, single step", ONE_STEP, is_hybrid=True, is_smoothed=True),
    Row("hybrid, smoothing", is_hybrid=True, is_smoothed=True),
    Row("least squared error, asymmetric", LEAST_ERROR),
    Row("dynamic, asymmetric", DYNAMIC_ACTIVATIONS),
    Row("dynamic, asymmetric, hybrid, smoothing", DYNAMIC_ACTIVATIONS, is_hybrid=True, is_smoothed=True),
)


def rounding(lab: sedimo.Lab, rules: ActivationSettings) -> sedimo.Lab:
    """The lab with activations rounded by some rules, calibrated on it."""
    found = round_activations(lab, rules)
    return lab if found is None else lab.treated(found)


def measure(lab: sedimo.Lab, number_format: sedimo.Format, n_kept: int, n_fresh: int) -> dict[str, object]:
    """All rows of one format."""
    base = rounding(lab, ALL_STEPS)
    kept = blocks_by_gain(base, number_format, lab.seeds.plan(range(N_RANKING)))[:n_kept]
    plan = lab.seeds.plan(range(FRESH_SEED, FRESH_SEED + n_fresh))
    (smoothing,) = plan_smoothings(lab, [DEFAULT_SMOOTHING])
    smoothed = lab.treated(smoothing)
    trials: dict[str, Trial] = {}
    for row in sorted(ROWS, key=lambda row: row.is_smoothed):  # the denoiser is smoothed once
        bench = rounding(smoothed if row.is_smoothed else lab, row.rules)
        recipe = hybrid_recipe(lab.space, number_format, kept if row.is_hybrid else [])
        (trials[row.name],) = bench.measure([recipe], plan)
    first = trials[ROWS[0].name]
    rows = {
        row.name: {
            **to_plain(summarize(trials[row.name].powers)),
            "ahead": to_plain(paired_difference(trials[row.name].powers, first.powers).estimate),
        }
        for row in ROWS
    }
    return {"kept": kept, "smoothed": sorted(smoothing.layers), "rows": rows}


def show(name: str, found: dict[str, Any]) -> None:
    """A table on the screen."""
    print(f"\n{name}; hybrid keeps {', '.join(found['kept'])}; smoothed: {', '.join(found['smoothed'])}")
    for row, values in found["rows"].items():
        ahead = values["ahead"]
        print(
            f"  {row:40s} {values['sqnr_db']:6.2f} ± {values['standard_error']:.2f} dB   "
            f"minus base {ahead['value']:+.2f} [{ahead['low']:+.2f}, {ahead['high']:+.2f}]",
            flush=True,
        )


def main() -> None:
    """Prints a table per format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="zoo:cifar-dit")
    parser.add_argument("--formats", default="uaq8a8,uaq4a8")
    parser.add_argument("--keep", type=int, default=2)
    parser.add_argument("--fresh", type=int, default=32)
    parser.add_argument("--run", type=Path, default=Path("runs/ingredients"))
    parser.add_argument("--out", type=Path, default=Path("runs/ingredients.json"))
    options = parser.parse_args()
    results = {}
    for text in options.formats.split(","):
        lab = sedimo.Lab(
            options.source,
            store=options.run / text,
            formats=f"{text},fp16",
            sampling=sedimo.SamplingSettings(n_seeds=N_CALIBRATION),
            progress=ConsoleProgress(),
        )
        results[text] = measure(lab, sedimo.Format.parse(text), options.keep, options.fresh)
        show(text, results[text])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
