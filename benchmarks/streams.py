"""Decisions per stream against decisions per layer, at equal paper bits, by first-order noise.

    python benchmarks/streams.py [--source zoo:cifar-ldm] [--bits 3.0,3.5,4.0] [--formats wide] [--run DIR]

Both choose among the same formats within the same bytes; the costs are probed on the searched seeds, the recipes
measured on fresh ones, paired. What differs is whether layers that read several streams have a decision for each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import sedimo
from sedimo.api.order import BudgetOrder
from sedimo.api.probing import attribute_measured, probe
from sedimo.api.searching import Measuring, allocated
from sedimo.cli.console import ConsoleProgress
from sedimo.codec import to_plain
from sedimo.measurement.study import Study
from sedimo.metrics.signal import paired_difference, summarize

FIRST_FRESH = 8


def main() -> None:
    """Prints a line per budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="zoo:cifar-ldm")
    parser.add_argument("--formats", default="wide")
    parser.add_argument("--bits", default="3.0,3.5,4.0")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--fresh", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--run", type=Path, default=Path("runs/streams"))
    parser.add_argument("--out", type=Path, default=Path("runs/streams.json"))
    options = parser.parse_args()
    progress, bits = ConsoleProgress(), [float(text) for text in options.bits.split(",")]
    pipe = sedimo.load(options.source, dtype=options.dtype)
    graph, trials = sedimo.trace(pipe), {}
    searched = pipe.default_sampling(range(options.seeds), options.steps)
    fresh = pipe.default_sampling(range(FIRST_FRESH, FIRST_FRESH + options.fresh), options.steps)
    with Study(options.run) as study:
        for name, streams in {"streams": True, "layers": False}.items():
            space = sedimo.search_space(graph, options.formats, streams=streams)
            bank = sedimo.fit(pipe, space, cache=options.run / "bank", progress=progress)
            table = attribute_measured(probe(pipe, bank, "jacobian", store=study, sampling=searched, progress=progress))
            recipes = [allocated(table, BudgetOrder(bits=b)).recipe for b in bits]
            found = Measuring.on(pipe, bank, study, fresh, progress=progress).trials(recipes)
            trials[name] = [(bank.space.paper_bits(trial.recipe), trial) for trial in found]
    results = []
    for budget, (split_bits, split), (whole_bits, whole) in zip(bits, trials["streams"], trials["layers"], strict=True):
        ahead = paired_difference(split.powers, whole.powers)
        ours, theirs = summarize(split.powers), summarize(whole.powers)
        results.append(
            {
                "budget_bits": budget,
                "streams": {"paper_bits": split_bits, **to_plain(ours)},
                "layers": {"paper_bits": whole_bits, **to_plain(theirs)},
                "ahead": to_plain(ahead),
            }
        )
        print(
            f"{budget:.2f} bits: per stream {ours.sqnr_db:.2f} dB ({split_bits:.4f}), "
            f"per layer {theirs.sqnr_db:.2f} dB ({whole_bits:.4f}), "
            f"ahead {ahead.mean_db:+.2f} [{ahead.low:+.2f}, {ahead.high:+.2f}], n = {ahead.n}",
            flush=True,
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
