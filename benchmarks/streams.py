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
from _suite.signal import summarize
from sedimo.cli.console import ConsoleProgress
from sedimo.codec import to_plain
from sedimo.lab.bench import Compute
from sedimo.metrics.signal import paired_difference

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
    bits = [float(text) for text in options.bits.split(",")]
    split = sedimo.Lab(
        options.source,
        store=options.run,
        formats=options.formats,
        sampling=sedimo.SamplingSettings(n_seeds=options.seeds, n_steps=options.steps),
        compute=Compute(options.dtype),
        progress=ConsoleProgress(),
    )
    whole = split.decided_on(sedimo.search_space(split.graph, options.formats, streams=False))
    fresh = split.seeds.plan(range(FIRST_FRESH, FIRST_FRESH + options.fresh))
    results, trials = [], {}
    for name, lab in {"streams": split, "layers": whole}.items():
        table = lab.table("jacobian")
        found = lab.measure([sedimo.allocate(table, bits=b).recipe for b in bits], fresh)
        trials[name] = [(lab.bank.space.paper_bits(trial.recipe), trial) for trial in found]
    for budget, (split_bits, by_stream), (whole_bits, by_layer) in zip(
        bits, trials["streams"], trials["layers"], strict=True
    ):
        ahead = paired_difference(by_stream.powers, by_layer.powers)
        ours, theirs = summarize(by_stream.powers), summarize(by_layer.powers)
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
