"""Sedimo beside the tools that one would use instead, on one trained denoiser, at equal stored bits.

Every tool gets the same float16 checkpoint; the tools that search get the same recorded denoiser calls; every result
is measured on the same fresh seeds and steps, in float32 on the CPU. Stored bits are all bytes of codes, scales, zero
points and codebooks of the quantized Linear and Conv weights, and float16 for the ones left alone, per distinct
weight. SQNR of the final latents is the mean over seeds of each seed's decibels, with its standard error.

    python benchmarks/peers.py --out docs/results/peers.json

Finished rows are kept in --cache, and the same command goes on where it was stopped. The peers are the extra `peers`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import logging
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from _peers import modelopt_adapter, quanto_adapter, sdnq_adapter, sedimo_adapter, tables
from _peers.evaluation import Evaluation, Row, search_plan
from _peers.weights import Quantized
from sedimo.codec import to_plain
from sedimo.lab.seeds import SamplingSettings
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.loading import load_pipeline

STORED_BITS = (3.5, 4.0, 4.5, 5.0, 5.3, 6.0)
PEERS = {"sdnq": sdnq_adapter, "quanto": quanto_adapter, "modelopt": modelopt_adapter}
TOOLS = (*PEERS, tables.SEDIMO)
MATCHED = ("modelopt", "quanto")  # peers at whose exact bytes Sedimo makes a recipe too
METHODS = ("error", "jacobian", "ablation", "combined", sedimo_adapter.SEARCH)


def main() -> int:
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    _be_quiet()
    started = time.perf_counter()
    adapter = load_pipeline(arguments.source, device="cpu", dtype="float32")
    if not isinstance(adapter, DiffusersPipeline):
        sys.exit(f"{arguments.source} is a denoiser without its pipeline and cannot be sampled")
    search = search_plan(adapter, arguments.search_seeds, arguments.search_steps)
    evaluation = Evaluation(adapter, arguments.seeds, arguments.steps, search, arguments.cache)
    rows, failures = _all_rows(arguments, evaluation)
    _show(arguments, rows, failures)
    if arguments.out:
        _write(arguments, evaluation, rows, failures, time.perf_counter() - started)
    return 1 if failures else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="zoo:cifar-dit", help="folder of a diffusers pipeline, hub id or zoo:NAME")
    parser.add_argument("--seeds", type=int, default=64, help="fresh seeds that are measured")
    parser.add_argument("--steps", type=int, default=20, help="steps of the measured sampling")
    parser.add_argument("--search-seeds", type=int, default=8, help="seeds of the recorded calls for searching")
    parser.add_argument("--search-steps", type=int, default=10, help="their steps")
    parser.add_argument("--bits", type=float, nargs="+", default=STORED_BITS, help="stored bits of Sedimo's recipes")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["jacobian"], help="Sedimo's methods")
    parser.add_argument("--ablation", action="store_true", help="Sedimo's ablation too (many more minutes)")
    parser.add_argument("--match-all", action="store_true", help="a Sedimo recipe at the bits of every peer")
    parser.add_argument("--rows", nargs="+", default=[""], help="only peers' rows whose label has one of these texts")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--cache", type=Path, default=Path("runs/peers"), help="where finished rows are kept")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    arguments = parser.parse_args()
    if arguments.ablation and "ablation" not in arguments.methods:
        arguments.methods = [*arguments.methods, "ablation"]
    return arguments


def _be_quiet() -> None:
    """Silences what the peers and diffusers say about GPUs and about each other's versions."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _all_rows(arguments: argparse.Namespace, evaluation: Evaluation) -> tuple[list[Row], dict[str, str]]:
    rows: list[Row] = []
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in PEERS:
            if name in arguments.tools:
                rows += _attempts(name, _peer_rows(name, evaluation, Path(scratch), arguments.rows), failures)
    if tables.SEDIMO in arguments.tools:
        rows += _attempts(tables.SEDIMO, _sedimo_rows(arguments, evaluation, rows), failures)
    return rows, failures


def _attempts(tool: str, rows: Iterator[Row], failures: dict[str, str]) -> list[Row]:
    """The rows of a tool, as far as it comes; a peer that is missing or breaks does not stop the others."""
    done: list[Row] = []
    started = time.perf_counter()
    try:
        for row in rows:
            done.append(row)
            s, size, seconds = row.summary, row.size, time.perf_counter() - started
            figures = f"{size.bits_once:.3f} bits, {s.sqnr_db:.2f} +- {s.standard_error:.2f} dB"
            print(f"[{tool} {len(done)}, {seconds:.0f} s] {row.label}: {figures}", flush=True)
    except importlib.metadata.PackageNotFoundError as error:
        failures[tool] = f"not installed: {error}. Install the peers with: pip install 'sedimo[peers]'"
    except Exception as error:  # noqa: BLE001  # the border of other people's code: the failure is the result
        traceback.print_exc()
        failures[tool] = f"{type(error).__name__}: {error}"
    if tool in failures:
        print(f"{tool} FAILED after {len(done)} rows: {failures[tool]}", flush=True)
    return done


def _peer_rows(name: str, evaluation: Evaluation, scratch: Path, wanted: list[str]) -> Iterator[Row]:
    adapter = PEERS[name]
    version = importlib.metadata.version(adapter.PACKAGE)
    for options in (row for row in adapter.ROWS if any(text in row.label for text in wanted)):

        def make(options: object = options) -> Quantized:
            denoiser = copy.deepcopy(evaluation.adapter.denoiser)
            if name == "modelopt":
                return modelopt_adapter.quantize(denoiser, options, evaluation.calls, scratch)
            return adapter.quantize(denoiser, options)

        yield evaluation.row(name, options.label, version, options, make)


def _sedimo_rows(arguments: argparse.Namespace, evaluation: Evaluation, peers: list[Row]) -> Iterator[Row]:
    layers, version = evaluation.layers, importlib.metadata.version(sedimo_adapter.PACKAGE)
    sampling = SamplingSettings(n_seeds=arguments.search_seeds, n_steps=arguments.search_steps)
    searches = sedimo_adapter.Searches(arguments.source, arguments.cache, sampling, layers)
    wanted = [r for r in peers if arguments.match_all or r.tool in MATCHED]
    goals = (
        *sedimo_adapter.goals(sorted(arguments.bits), layers),
        *(sedimo_adapter.Goal(f"{r.size.bits_once:.3f} = {r.tool}", r.size.n_bytes_once) for r in wanted),
    )
    for method in arguments.methods:
        for goal in goals:
            bank, allocation = searches.allocation(method, goal)

            def make(bank: object = bank, allocation: object = allocation) -> Quantized:
                return sedimo_adapter.quantize(copy.deepcopy(evaluation.adapter.denoiser), bank, allocation)

            row = evaluation.row(tables.SEDIMO, f"{method} {goal.name}", version, allocation.recipe.key, make)
            if row.size.n_bytes_once != allocation.used_bytes:
                raise ValueError(
                    f"{row.label}: {row.size.n_bytes_once} bytes counted, {allocation.used_bytes} allocated"
                )
            yield row


def _show(arguments: argparse.Namespace, rows: list[Row], failures: dict[str, str]) -> None:
    tables.print_rows(rows)
    for method in arguments.methods if tables.SEDIMO in arguments.tools else ():
        tables.print_comparison(tables.compare(rows, method), method)
    for tool, reason in failures.items():
        print(f"\n{tool} FAILED: {reason}")


def _write(
    arguments: argparse.Namespace, evaluation: Evaluation, rows: list[Row], failures: dict[str, str], seconds: float
) -> None:
    document = {
        "command": "python " + " ".join(sys.argv),
        "seconds": round(seconds, 1),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": arguments.threads,
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": importlib.metadata.version("diffusers"),
        },
        "setting": {
            "source": arguments.source,
            "weights": evaluation.weights_digest,
            "objective": "final_latents",
            "dtype": "float32",
            "measured": to_plain(evaluation.sampling),
            "searched": to_plain(evaluation.search),
            "n_distinct_weights": evaluation.layers.n_distinct_weights,
        },
        "rows": [tables.plain_row(r) for r in rows],
        "comparisons": {m: tables.compare(rows, m) for m in arguments.methods},
        "failures": failures,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1, allow_nan=False, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(main())
