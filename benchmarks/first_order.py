"""Predicted against measured noise, decision by decision: where does first-order noise err, and why?

    python benchmarks/first_order.py SOURCE [--guidance G] [--bits 3.5] [--work DIR]

The recipe is that of `jacobian` at so many stored bits. Each of its decisions is quantized alone and sampled (8 seeds,
10 steps, final latents, relative noise), and set beside what was predicted of it: by single steps, relative to
each step's output or not, by the whole run, by weight error, and by the change of single steps at recorded inputs.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

import sedimo
from _suite.steps import StepNoise, Steps
from sedimo.allocation.effects import Effects
from sedimo.allocation.table import SensitivityTable
from sedimo.cli.console import ConsoleProgress
from sedimo.lab.exchange import probed
from sedimo.methods.adjoint import ADJOINT
from sedimo.methods.method import Task
from sedimo.quant.formats import Format

WIDTHS = (2, 3, 4, 5)
SIZES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, np.inf)  # of predicted relative noise
HEADS = ("predicted by", "SRCC", "corr. of logs", "10 %", "50 %", "90 %", "90 % / 10 %", "sum predicted")
Values = Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """A model with what is known of it, and the recipe that is looked at."""

    lab: sedimo.Lab
    jacobian: SensitivityTable
    adjoint: SensitivityTable
    effects: Effects
    choice: Mapping[str, Format]

    @property
    def n_seeds(self) -> int:
        """Samples that are measured, which are the first of the adjoint's."""
        return self.lab.seeds.settings.n_seeds

    def raw(self, choice: Mapping[str, Format]) -> np.ndarray:
        """The adjoint's noise of a choice on the measured samples, `[n]`, as its products say."""
        return self.effects.noise(choice)[: self.n_seeds]

    def cost(self, name: str, number_format: Format) -> float:
        """The adjoint's cost, which all choices together tell, for the measured samples."""
        level = np.square(self.effects.levels[: self.n_seeds]).mean()
        return self.adjoint.index[name, number_format].cost * float(level)


@dataclass(frozen=True)
class Sampled:
    """Changes of the final latents `[n, ...]` by each decision alone and by all, relative to the samples' norms."""

    alone: Mapping[str, np.ndarray]
    whole: np.ndarray

    @property
    def measured(self) -> dict[str, float]:
        """Relative noise of each decision, mean over samples."""
        return {name: _power(change).mean() for name, change in self.alone.items()}


def sample_alone(case: Case) -> Sampled:
    """The final latents with each decision quantized alone, and with the whole recipe."""
    pipe, bank, plan = case.lab.pipe, case.lab.bank, case.lab.seeds.search
    reference = pipe.sample(plan).double().flatten(1).numpy()
    norms = np.linalg.norm(reference, axis=1, keepdims=True)

    def change(choice: Mapping[str, Format]) -> np.ndarray:
        with probed(pipe.denoiser, bank.quantize(bank.space.recipe(choice))):
            return (pipe.sample(plan).double().flatten(1).numpy() - reference) / norms

    return Sampled({name: change({name: f}) for name, f in case.choice.items()}, change(case.choice))


def compare(title: str, predicted: Values, measured: Values) -> list[str]:
    """A line of the table."""
    names = [n for n in measured if predicted[n] > 0 and measured[n] > 0]
    x, y = (np.array([values[n] for n in names]) for values in (predicted, measured))
    low, middle, high = np.quantile(y / x, (0.1, 0.5, 0.9))
    srcc, logs = stats.spearmanr(x, y).statistic, np.corrcoef(np.log(x), np.log(y))[0, 1]
    cells = (f"{srcc:.3f}", f"{logs:.3f}", f"{low:.3g}", f"{middle:.3g}", f"{high:.3g}", f"{high / low:.1f}")
    return [title, *cells, f"{x.sum():.4g}"]


def show_methods(case: Case, sampled: Sampled, first: StepNoise, finite: StepNoise) -> None:
    """(a) to (d), and (f) beside them."""
    choice, measured, index = case.choice, sampled.measured, case.jacobian.index
    predictions: dict[str, Values] = {
        "(a) `jacobian`, per step, relative to its output": {n: index[n, f].cost for n, f in choice.items()},
        "(a) the same by plain autograd": {n: first.relative(n) for n in choice},
        "(b) per step, absolute": {n: first.absolute(n) for n in choice},
        "(c) `adjoint`, products of the same samples": {n: float(case.raw({n: f}).mean()) for n, f in choice.items()},
        "(c) `adjoint`, costs of the table": {n: case.cost(n, f) for n, f in choice.items()},
        "(d) weight error": {n: case.lab.bank.index[n, f].error for n, f in choice.items()},
        "(f) finite change at recorded inputs, relative": {n: finite.relative(n) for n in choice},
        "(f) finite change at recorded inputs, absolute": {n: finite.absolute(n) for n in choice},
    }
    total = sum(measured.values())
    print(f"\nEach decision alone, n = {len(choice)} decisions, {case.n_seeds} seeds, sum measured {total:.4g};")
    print("quantiles are those of measured / predicted:\n")
    print_table(HEADS, [compare(title, values, measured) for title, values in predictions.items()])
    shown, plain = (predictions[k] for k in list(predictions)[:2])
    worst = max(abs(plain[n] / shown[n] - 1) for n in choice if shown[n] > 0)
    print(f"\nOur `jacobian` and plain autograd in the same directions differ by at most {worst:.1e} of a cost.")


def show_steps(case: Case, first: StepNoise, finite: StepNoise) -> None:
    """(f) Whether one step is linear in the change."""
    print("\n**(f) Is one step linear?** Finite change of the outputs at recorded inputs over the first-order one:\n")
    by_width: dict[int, list[str]] = {}
    for name, f in case.choice.items():
        by_width.setdefault(f.bits, []).append(name)
    body = []
    for bits, names in [*sorted(by_width.items()), ("all", list(case.choice))]:
        ratios = np.array([finite.relative(n) / first.relative(n) for n in names if first.relative(n) > 0])
        sums = [sum(one.relative(n) for n in names) for one in (finite, first)]
        body.append([bits, len(names), *(f"{q:.2f}" for q in np.quantile(ratios, (0.1, 0.5, 0.9))), *_ratio(*sums)])
    print_table(("bits", "n", "10 %", "50 %", "90 %", "sum finite", "sum first-order", "ratio"), body)


def show_widths(case: Case, n_decisions: int) -> None:
    """(e) Whether the whole run is linear, by bits and by size of the noise."""
    space = case.lab.bank.space
    able = [d.name for d in space.decisions if {Format("uaq", b) for b in WIDTHS} <= set(d.formats)]
    names = [able[i] for i in sorted({round(i) for i in np.linspace(0, len(able) - 1, min(n_decisions, len(able)))})]
    keys = [(name, Format("uaq", bits)) for bits in WIDTHS for name in names]
    trials = case.lab.measure([space.recipe({name: f}) for name, f in keys], case.lab.seeds.search)
    measured = np.array([t.powers.ratio.mean() for t in trials])
    raw = np.array([case.raw(dict([key])).mean() for key in keys])
    cost = np.array([case.cost(*key) for key in keys])
    bits = np.array([f.bits for _, f in keys])
    print(
        f"\n**(e) Is the whole run linear?** Measured / predicted by `adjoint`, `uaq`, {len(names)} decisions alone:\n"
    )
    groups = [(f"{b} bits", bits == b) for b in WIDTHS]
    groups += [
        (f"predicted {low:g} to {high:g}", (cost >= low) & (cost < high)) for low, high in itertools.pairwise(SIZES)
    ]
    body = []
    for title, kept in groups:
        if not kept.any():
            continue
        quantiles = (f"{q:.2f}" for q in np.quantile(measured[kept] / cost[kept], (0.1, 0.5, 0.9)))
        sums = _ratio(measured[kept].sum(), cost[kept].sum())
        body.append([title, kept.sum(), *quantiles, *sums, f"{measured[kept].sum() / raw[kept].sum():.2f}"])
    print_table(("which", "n", "10 %", "50 %", "90 %", "sum measured", "sum predicted", "ratio", "by products"), body)


def show_sums(case: Case, sampled: Sampled) -> None:
    """(g) How the noise of a whole recipe follows from that of its decisions."""
    whole = _power(sampled.whole)
    summed = np.sum(list(sampled.alone.values()), axis=0)
    singles = np.sum([_power(change) for change in sampled.alone.values()], axis=0)
    predicted = np.sum([case.raw({n: f}) for n, f in case.choice.items()], axis=0)
    rows = {
        "measured, the whole recipe": whole,
        "measured, changes of single decisions summed with signs": _power(summed),
        "measured, noises of single decisions summed": singles,
        "`adjoint`, products summed with signs": case.raw(case.choice),
        "`adjoint`, noises summed": predicted,
    }
    print("\n**(g) Do the decisions' noises add?**\n")
    body = []
    for title, values in rows.items():
        ratio, decibels = values.mean() / whole.mean(), (-10 * np.log10(values)).mean()
        error = (values / whole.mean() - ratio * whole / whole.mean()).std(ddof=1) / np.sqrt(len(whole))
        body.append([title, f"{values.mean():.4g}", f"{ratio:.2f} ± {error:.2f}", f"{decibels:.2f}"])
    print_table(("how", "relative noise", "over the whole recipe's", "mean SQNR [dB]"), body)


def show_operations(case: Case, sampled: Sampled) -> None:
    """Which operations the noise of single steps misjudges."""
    measured, index = sampled.measured, case.jacobian.index
    operations: dict[str, list[str]] = {}
    for d in case.lab.bank.space.decisions:
        if d.name in measured:
            operations.setdefault(d.operation, []).append(d.name)
    common = np.median([measured[n] / index[n, f].cost for n, f in case.choice.items() if index[n, f].cost > 0])
    body = []
    for operation, names in operations.items():
        noise = sum(measured[n] for n in names)
        by_steps = sum(index[n, case.choice[n]].cost for n in names)
        by_run = sum(case.cost(n, case.choice[n]) for n in names)
        share, bits = noise / sum(measured.values()), sorted({case.choice[n].bits for n in names})
        ratios = (f"{noise / max(by_steps, 1e-30) / common:.2f}", f"{noise / max(by_run, 1e-30):.2f}")
        body.append([operation, len(names), ", ".join(map(str, bits)), f"{100 * share:.1f} %", *ratios])
    body.sort(key=lambda line: -float(line[4]))
    print(
        "\n**By operation**, the sum measured over the sum predicted; that of `jacobian` over its median decision's:\n"
    )
    print_table(("operation", "n", "bits", "share of noise", "`jacobian`", "`adjoint`"), body)


def print_table(heads, body) -> None:
    """A Markdown table."""
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for line in body:
        print("| " + " | ".join(str(cell) for cell in line) + " |", flush=True)


def _power(change: np.ndarray) -> np.ndarray:
    return np.square(change).sum(axis=1)


def _ratio(upper: float, lower: float) -> tuple[str, str, str]:
    return f"{upper:.4g}", f"{lower:.4g}", f"{upper / lower:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--bits", type=float, default=3.5, help="stored bits of the recipe")
    parser.add_argument("--decisions", type=int, default=40, help="that are measured at several widths")
    parser.add_argument("--work", type=Path, default=Path("runs/first_order"))
    arguments = parser.parse_args()
    lab = sedimo.Lab(
        arguments.source,
        store=arguments.work / Path(arguments.source.removeprefix("zoo:")).name,
        sampling=sedimo.SamplingSettings(guidance=arguments.guidance),
        progress=ConsoleProgress(),
    )
    jacobian, adjoint = lab.table("jacobian"), ADJOINT.measure(lab, Task(ADJOINT.knobs()))
    chosen = sedimo.allocate(jacobian, stored_bits=arguments.bits)
    choice = {name: f for name, f in chosen.choice.items() if f.is_quantized}
    case = Case(lab, jacobian, adjoint.table, adjoint.need(Effects), choice)
    print(f"\n## {arguments.source}, the recipe of `jacobian` at {chosen.stored_bits:.2f} stored bits")
    sampled, steps = sample_alone(case), Steps(lab.pipe, lab.seeds.search)
    weights = ", ".join(f"{w:.2f}" for w in steps.weights)
    print(f"\nA sample's rows count by {weights} in its prediction.")
    first, finite = steps.first_order(lab.bank, choice), steps.finite(lab.bank, choice)
    show_methods(case, sampled, first, finite)
    show_steps(case, first, finite)
    show_widths(case, arguments.decisions)
    show_sums(case, sampled)
    show_operations(case, sampled)


if __name__ == "__main__":
    main()
