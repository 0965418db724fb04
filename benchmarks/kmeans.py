"""Time and quality of the quantizers, against scikit-learn's KMeans and kmeans1d on the same rows in the same process.

    python benchmarks/kmeans.py                  # one thread, rows of 1152 and 4608 half-precision weights
    python benchmarks/kmeans.py --json out.json

The published implementation of Qua2SeDiMo calls scikit-learn with max_iter=100 once per output channel (kmc), or
once per tensor (kma); that is what is timed here, on as many rows as a few seconds allow. Every time is the best
of `--repeats`, in processor time per weight, so that it can be multiplied with any model's size.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from pathlib import Path

import kmeans1d
import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from sedimo.quant.families.kmeans import fit_codebooks
from sedimo.quant.fitting import fit_parameters
from sedimo.quant.formats import PAPER_FORMATS, Format

TIED = 1e-9  # relative difference at which two squared errors count as equal
MODEL_WEIGHTS = 610e6  # PixArt-XL


def make_weight(n_rows: int, n_inputs: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n_rows, n_inputs, generator=generator) * 0.02).half()


def seconds(call, repeats: int) -> float:
    """Processor seconds; with one thread that is what an idle machine would need on the clock."""

    def once() -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    return min(once() for _ in range(repeats))


def time_formats(weight: torch.Tensor, repeats: int) -> dict[str, float]:
    """Nanoseconds per weight of each format alone, of those that share work, and of all six together."""
    groups = {str(f): [f] for f in PAPER_FORMATS}
    groups["kmc3 and kmc4"] = [Format.parse("kmc3"), Format.parse("kmc4")]
    groups["all six"] = list(PAPER_FORMATS)
    return {
        name: seconds(lambda formats=formats: fit_parameters(weight, formats), repeats) / weight.numel() * 1e9
        for name, formats in groups.items()
    }


def time_scikit_learn(weight: torch.Tensor, n_rows: int) -> dict[str, float]:
    """Nanoseconds per weight of KMeans: per row (kmc), and for some rows as one tensor (kma)."""
    rows = weight[:n_rows].double().numpy()
    found = {}
    for bits in (3, 4):
        solver = KMeans(1 << bits, max_iter=100)

        def per_row(solver=solver) -> None:
            for row in rows:
                solver.fit(row.reshape(-1, 1))

        found[f"kmc{bits}"] = seconds(per_row, 1) / rows.size * 1e9
        found[f"kma{bits}"] = seconds(lambda solver=solver: solver.fit(rows.reshape(-1, 1)), 1) / rows.size * 1e9
    return found


def compare_errors(weight: torch.Tensor, n_rows: int) -> dict[str, dict[str, float]]:
    """Squared error over the optimum of kmeans1d: the worst of our rows, and the mean and worst of KMeans."""
    rows = weight[:n_rows].float()
    found = {}
    for bits, (_, errors) in zip((3, 4), fit_codebooks(rows.numpy(), [8, 16]), strict=True):
        ours, theirs = [], []
        for row, error in zip(rows.double().numpy(), errors.tolist(), strict=True):
            labels, centroids = kmeans1d.cluster(row, 1 << bits)
            optimum = float(((row - np.array(centroids)[labels]) ** 2).sum())
            ours.append(error / optimum)
            theirs.append(KMeans(1 << bits, max_iter=100, random_state=0).fit(row.reshape(-1, 1)).inertia_ / optimum)
        if max(abs(ratio - 1) for ratio in ours) > TIED:
            raise SystemExit(f"kmc{bits} missed the optimum of kmeans1d: {max(ours)=}, {min(ours)=}")
        found[f"kmc{bits}"] = {
            "rows": len(ours),
            "ours_worst_deviation": max(abs(ratio - 1) for ratio in ours),
            "scikit_learn_mean_ratio": float(np.mean(theirs)),
            "scikit_learn_worst_ratio": max(theirs),
        }
    return found


def measure(n_inputs: int, options: argparse.Namespace) -> dict[str, object]:
    weight = make_weight(max(1, options.weights // n_inputs), n_inputs, options.seed)
    fit_parameters(weight[:2], PAPER_FORMATS)  # loads the compiled kernels
    ours, theirs = time_formats(weight, options.repeats), time_scikit_learn(weight, options.sklearn_rows)
    errors = compare_errors(weight, options.sklearn_rows)
    print(f"\nrows of {n_inputs} float16 weights, {len(weight)} rows, seed {options.seed}: nanoseconds per weight")
    print(f"{'format':16}{'sedimo':>10}{'KMeans':>10}{'ratio':>8}")
    for name, value in ours.items():
        reference = theirs.get(name)
        print(f"{name:16}{value:10.1f}" + (f"{reference:10.0f}{reference / value:8.0f}" if reference else ""))
    for name, error in errors.items():
        print(
            f"{name}: {error['rows']} rows within {error['ours_worst_deviation']:.1e} of the optimum (kmeans1d); "
            f"KMeans has {error['scikit_learn_mean_ratio']:.3f} times the optimal squared error on average, "
            f"{error['scikit_learn_worst_ratio']:.3f} at worst"
        )
    total = ours["all six"] * MODEL_WEIGHTS / 1e9 / options.cores
    print(f"all six formats of {MODEL_WEIGHTS / 1e6:.0f} M such weights: {total:.0f} s on {options.cores} cores")
    return {"n_inputs": n_inputs, "sedimo_ns": ours, "scikit_learn_ns": theirs, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, nargs="+", default=[1152, 4608], help="weights per row")
    parser.add_argument("--weights", type=int, default=2_000_000, help="weights in all rows together")
    parser.add_argument("--sklearn-rows", type=int, default=40, help="rows that scikit-learn and kmeans1d do")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cores", type=int, default=2, help="for the extrapolation; the measurement uses one thread")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 100 iterations, as published, are not always enough
        results = [measure(n_inputs, options) for n_inputs in options.inputs]
    machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    if options.json:
        options.json.write_text(json.dumps({"results": results, **machine, **versions}, indent=1))


if __name__ == "__main__":
    main()
