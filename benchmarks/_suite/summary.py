"""The tables of `generalization.py` as Markdown: numbers from the JSON files only, no measuring."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from _suite.measuring import BUDGETS, DEFAULT, FORMER, JACOBIAN, METHODS, MODELOPT, NEAREST, UNIFORM
from _suite.models import HALVES
from sedimo.codec import from_plain
from sedimo.metrics.estimate import Estimate, mean_estimate
from sedimo.metrics.signal import NoisePowers, PairedDifference, paired_difference

RIVALS = (FORMER, MODELOPT, UNIFORM, JACOBIAN, NEAREST)
CLOSE_DB = 0.5
_SAME_DB = 1e-9


@dataclass(frozen=True)
class Row:
    """A method's recipe on the fresh seeds of a model."""

    stored_bits: float
    powers: NoisePowers
    facts: Mapping[str, Any]

    @property
    def sqnr(self) -> Estimate:
        """Mean over samples [dB]."""
        return mean_estimate(self.powers.sqnr_db)

    @property
    def predicted_db(self) -> float | None:
        """What was predicted of it [dB]."""
        found = self.facts.get("predicted")
        return float(found["value"]) if isinstance(found, dict) else None


@dataclass(frozen=True)
class Result:
    """One model's rows by budget and method."""

    name: str
    half: str
    facts: Mapping[str, Any]
    rows: Mapping[tuple[float, str], Row]

    def difference(self, bits: float, rival: str) -> PairedDifference | None:
        """The default minus a rival on the same seeds."""
        ours, theirs = self.rows.get((bits, DEFAULT)), self.rows.get((bits, rival))
        return None if ours is None or theirs is None else paired_difference(ours.powers, theirs.powers)


def print_summary(paths: Sequence[Path], names: Sequence[str] | None) -> None:
    """All tables of the models whose files are given."""
    results = [read(path) for path in paths if not names or path.stem in names]
    results.sort(key=lambda r: HALVES.index(r.half))
    if not results:
        print("no results yet")
        return
    print_setting(results)
    print_rows(results)
    print_differences(results)
    print_predictions(results)
    for half in [h for h in HALVES if any(r.half == h for r in results)]:
        own = [r for r in results if r.half == half]
        print(f"\n### {half.capitalize()}: {', '.join(r.name for r in own)}")
        print_means(own)
        print_ranks(own)


def read(path: Path) -> Result:
    """A finished model."""
    found = json.loads(path.read_text())
    rows = {
        (row["budget"], row["method"]): Row(
            row["stored_bits"],
            from_plain(NoisePowers, row["powers"]),
            {k: v for k, v in row.items() if k != "powers"},
        )
        for row in found["rows"]
    }
    return Result(found["model"]["name"], found["model"]["half"], found, rows)


def print_setting(results: Sequence[Result]) -> None:
    """Machine, versions, seeds and time."""
    for machine in {json.dumps(r.facts["machine"]): r.facts["machine"] for r in results}.values():
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        print(
            f"{machine['processor']}, flags {', '.join(machine['flags'])} (torch uses {machine['torch_capability']}), "
            f"{machine['threads']} threads of {machine['cores']} cores; {versions}.\n"
        )
    first = results[0].facts
    fresh, n = first["fresh_seeds"], next(iter(results[0].rows.values())).powers.n
    print(f"Fresh seeds {fresh[0]} to {fresh[1]}, n = {n}, {first['n_steps']} steps, formats `wide`, stored bits.\n")
    body = [
        [r.name, r.half, f"{r.facts['n_weights']:,}", r.facts["n_decisions"], _guidance(r), f"{r.facts['seconds']:.0f}"]
        for r in results
    ]
    print_table(["model", "half", "weights", "decisions", "guidance", "seconds in all"], body)
    for r in results:
        for note in r.facts["notes"]:
            print(f"\n{r.name}: {note}")


def print_rows(results: Sequence[Result]) -> None:
    """SQNR of every row."""
    print("\nSQNR [dB], mean ± standard error:\n")
    body = [
        [r.name, f"{bits:.1f}", *(_pm(r.rows.get((bits, m))) for m in METHODS), _uniform(r, bits)]
        for r in results
        for bits in BUDGETS
    ]
    print_table(["model", "bits", *METHODS, "best uniform"], body)


def print_differences(results: Sequence[Result]) -> None:
    """The default minus each rival, paired by seed."""
    print("\nThe default minus a rival [dB], 95 % interval, paired by seed:\n")
    body = [
        [r.name, f"{bits:.1f}", *(_interval(r.difference(bits, m)) for m in RIVALS)]
        for r in results
        for bits in BUDGETS
    ]
    print_table(["model", "bits", *RIVALS], body)


def print_predictions(results: Sequence[Result]) -> None:
    """What was predicted of the default's recipe beside what was measured."""
    print("\nThe default's recipe, predicted and measured SQNR [dB]:\n")
    body = [
        [r.name, f"{bits:.1f}", f"{row.predicted_db:.1f}", _pm(row), _error(row), row.facts.get("winner", "")]
        for r in results
        for bits in BUDGETS
        if (row := r.rows.get((bits, DEFAULT))) is not None and row.predicted_db is not None
    ]
    print_table(["model", "bits", "predicted", "measured", "predicted minus measured", "winner"], body)


def print_means(results: Sequence[Result]) -> None:
    """Means over models of the paired differences, with Student's t over models."""
    print(f"\nThe default minus a rival [dB], mean over {len(results)} models, 95 % interval by t over models:\n")
    body = []
    for rival in METHODS[1:]:
        cells = [_mean_cell(_differences(results, [bits], rival)) for bits in BUDGETS]
        body.append([rival, *cells, _mean_cell(_differences(results, BUDGETS, rival))])
    print_table(["minus", *(f"{bits:.1f}" for bits in BUDGETS), "all budgets"], body)
    errors = [
        row.predicted_db - row.sqnr.value
        for r in results
        for (_, method), row in r.rows.items()
        if method == DEFAULT and row.predicted_db is not None
    ]
    print(
        f"\nPredicted minus measured SQNR of the default: median absolute error {np.median(np.abs(errors)):.2f} dB, "
        f"mean {np.mean(errors):+.2f} dB, largest {max(errors, key=abs):+.2f} dB, n = {len(errors)}."
    )


def print_ranks(results: Sequence[Result]) -> None:
    """How often each method is best, nearly best, or not worth its while."""
    print("\nRanks (1 is the best, over models and budgets):\n")
    cases = [case for r in results for bits in BUDGETS if len(case := _scores(r, bits)) > 1]
    body = []
    for method in METHODS:
        own = [(case, case[method]) for case in cases if method in case]
        if not own:
            continue
        ranks = [float(rankdata([-v for v in case.values()])[list(case).index(method)]) for case, _ in own]
        best = sum(v >= max(case.values()) - _SAME_DB for case, v in own)
        close = sum(v >= max(case.values()) - CLOSE_DB for case, v in own)
        worse = sum(v < case.get(UNIFORM, -np.inf) - _SAME_DB for case, v in own)
        behind = [max(case.values()) - v for case, v in own]
        n = f"of {len(own)}"
        body.append([method, f"{np.mean(ranks):.2f}", f"{best} {n}", f"{close} {n}", f"{worse} {n}", _mean(behind)])
    heads = ["mean rank", "best", f"within {CLOSE_DB} dB of it", "worse than uniform", "mean behind the best [dB]"]
    print_table(["method", *heads], body)


def print_table(heads: Sequence[str], body: Sequence[Sequence[object]]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for line in body:
        print("| " + " | ".join(str(cell) for cell in line) + " |")


def _differences(results: Sequence[Result], budgets: Sequence[float], rival: str) -> list[float]:
    """Of each model that has any, the mean over budgets."""
    found = []
    for r in results:
        known = [d.mean_db for bits in budgets if (d := r.difference(bits, rival)) is not None]
        if known:
            found.append(float(np.mean(known)))
    return found


def _scores(result: Result, bits: float) -> dict[str, float]:
    return {m: result.rows[bits, m].sqnr.value for m in METHODS if (bits, m) in result.rows}


def _mean_cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    found = mean_estimate(values)
    return f"{found.value:+.2f}" + (f" [{found.low:+.2f}, {found.high:+.2f}]" if len(values) > 1 else "")


def _interval(found: PairedDifference | None) -> str:
    return "" if found is None else f"{found.mean_db:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _pm(row: Row | None) -> str:
    return "" if row is None else f"{row.sqnr.value:.2f} ± {row.sqnr.standard_error:.2f}"


def _error(row: Row) -> str:
    return "" if row.predicted_db is None else f"{row.predicted_db - row.sqnr.value:+.2f}"


def _uniform(result: Result, bits: float) -> str:
    row = result.rows.get((bits, UNIFORM))
    return "" if row is None else f"{row.facts['format']} ({row.stored_bits:.2f})"


def _guidance(result: Result) -> str:
    return "its own" if result.facts["guidance"] is None else f"{result.facts['guidance']:g}"


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}"
