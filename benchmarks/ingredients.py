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

import sedimo
from sedimo.api.hybrid import blocks_by_gain
from sedimo.api.order import SamplingOrder
from sedimo.api.searching import Measuring
from sedimo.api.smooth_order import SmoothOrder
from sedimo.api.smoothing import apply_smoothing, measure_smoothing
from sedimo.api.verbs import weights_of
from sedimo.bank import fit_bank
from sedimo.cli.console import ConsoleProgress
from sedimo.codec import to_plain
from sedimo.measurement.calibration import CalibrationOptions, calibrate
from sedimo.measurement.study import Study
from sedimo.metrics.signal import paired_difference, summarize
from sedimo.pipelines.weights import ModuleWeights
from sedimo.quant.activations import DYNAMIC, Activations
from sedimo.quant.formats import Format
from sedimo.sensitivity.blocks import hybrid_recipe
from sedimo.space import search_space

ALL_STEPS, ONE_STEP = CalibrationOptions(symmetric=True), CalibrationOptions(n_steps=1, symmetric=True)
LEAST_ERROR = CalibrationOptions("mse")
FRESH_SEED = 1000


@dataclass(frozen=True)
class Row:
    """Which ingredients a row has; `rules` None: each token's or image's own range."""

    name: str
    rules: CalibrationOptions | None = ALL_STEPS
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
    Row("dynamic, asymmetric", None),
    Row("dynamic, asymmetric, hybrid, smoothing", None, is_hybrid=True, is_smoothed=True),
)


class Bench:
    """A pipeline, as it came or smoothed, at one format."""

    def __init__(self, pipe, number_format: Format, study: Study, progress: ConsoleProgress) -> None:
        self.pipe, self.format, self.study, self.progress = pipe, number_format, study, progress
        self.graph = sedimo.trace(pipe)
        self.space = search_space(self.graph, [number_format, "fp16"])
        self.calibration = SamplingOrder(n_seeds=64).searching(pipe)
        self.cache = study.path.parent

    def bank(self, *, is_smoothed: bool):
        """The bank of the weights as they are now."""
        weights = ModuleWeights(self.pipe.denoiser) if is_smoothed else weights_of(self.pipe)
        return fit_bank(weights, self.space, sample_channels=2, cache=self.cache)

    def ranked_blocks(self, n_seeds: int) -> list[str]:
        """Blocks by what staying at 16 bits gains at the base's rules, greatest first."""
        bank = self.rounding(self.bank(is_smoothed=False), ALL_STEPS)
        plan = SamplingOrder(n_seeds=n_seeds).searching(self.pipe)
        measuring = Measuring.on(self.pipe, bank, self.study, plan, progress=self.progress)
        return blocks_by_gain(self.space, self.format, measuring)

    def rounding(self, bank, rules: CalibrationOptions | None):
        """The bank with activations rounded by some rules."""
        return bank.rounding(DYNAMIC if rules is None else self._calibrated(bank, rules))

    def _calibrated(self, bank, rules: CalibrationOptions) -> Activations:
        widths = {layer: (self.format.activation_bits,) for d in self.space.decisions for layer in d.layers}
        return calibrate(
            self.pipe,
            widths,
            self.calibration,
            weights_digest=bank.weights_digest,
            options=rules,
            study=self.study,
            progress=self.progress,
        )

    def trials(self, rows: list[Row], kept: list[str], plan) -> dict[str, object]:
        """The trials of rows that are smoothed alike."""
        found = {}
        for row in rows:
            bank = self.rounding(self.bank(is_smoothed=row.is_smoothed), row.rules)
            recipe = hybrid_recipe(self.space, self.format, kept if row.is_hybrid else [])
            (found[row.name],) = Measuring.on(self.pipe, bank, self.study, plan, progress=self.progress).trials(
                [recipe]
            )
        return found


def measure(bench: Bench, n_kept: int, n_fresh: int) -> dict[str, object]:
    """All rows of one format; smoothing is undone at the end."""
    plan = SamplingOrder(first_seed=FRESH_SEED, n_seeds=n_fresh).searching(bench.pipe)
    kept = bench.ranked_blocks(8)[:n_kept]
    trials = bench.trials([row for row in ROWS if not row.is_smoothed], kept, plan)
    how = (bench.calibration, bench.study, bench.progress)
    smoothing = measure_smoothing(bench.pipe, bench.graph, weights_of(bench.pipe), SmoothOrder(), how)
    restore = apply_smoothing(bench.pipe, smoothing, bench.calibration)
    try:
        trials |= bench.trials([row for row in ROWS if row.is_smoothed], kept, plan)
    finally:
        restore()
    base = trials[ROWS[0].name]
    rows = {
        row.name: {
            **to_plain(summarize(trials[row.name].powers)),
            "ahead": to_plain(paired_difference(trials[row.name].powers, base.powers).estimate),
        }
        for row in ROWS
    }
    return {"kept": kept, "smoothed": sorted(smoothing.layers), "rows": rows}


def show(name: str, found: dict[str, object]) -> None:
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
    progress, results = ConsoleProgress(), {}
    for text in options.formats.split(","):
        with Study(options.run / text) as study:
            bench = Bench(sedimo.load(options.source), Format.parse(text), study, progress)
            results[text] = measure(bench, options.keep, options.fresh)
        show(text, results[text])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
