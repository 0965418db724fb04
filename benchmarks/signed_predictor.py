"""Does a graph network trained on measured recipes add anything to first-order effects with signs? Paired.

    python benchmarks/signed_predictor.py SRC [--guidance G] [--trials 120] [--extra 60] [--run DIR]

Stratified random recipes of formats `wide` from 3 to 5 paper bits are measured (8 seeds x 10 steps, SQNR of the final
latents), and further ones within 0.05 bits of 4.0 that no predictor is trained on. `signed effects` is what method
adjoint says of a recipe (32 samples, no recipe measured), as it is; the network and the other rivals are trained on
the measured recipes, with a line from the signed effects for their unit. Codes by error feedback with --compensate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import sedimo
from sedimo.cli.console import ConsoleProgress
from sedimo.codec import to_plain
from sedimo.lab.exploration import Exploration, random_recipe_near
from sedimo.methods.adjoint import ADJOINT, SAMPLES_PER_SEED
from sedimo.methods.predictor.goal import Goal
from sedimo.methods.predictor.quality import rate
from sedimo.methods.predictor.study import measure_background, training_set
from sedimo.methods.predictor.training import FAST, train_predictor
from sedimo.treatments.error_feedback import FeedbackSettings, feed_back

LOW, HIGH, BAND = 3.0, 5.0, 4.0
QUALITIES = ("srcc", "kendall_tau", "mae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--extra", type=int, default=60)
    parser.add_argument("--compensate", action="store_true")
    parser.add_argument("--run", type=Path, default=Path("runs/signed-predictor"))
    parser.add_argument("--out", type=Path, help="a JSON besides")
    arguments = parser.parse_args()
    progress = ConsoleProgress()
    sampling = sedimo.SamplingSettings(guidance=arguments.guidance)
    lab = sedimo.Lab(arguments.source, store=arguments.run, sampling=sampling, progress=progress)
    if arguments.compensate:
        lab = lab.treated(feed_back(lab, FeedbackSettings()))
    space = lab.bank.space
    known = measure_background(lab, ADJOINT.name, lab.seeds.more(SAMPLES_PER_SEED * sampling.n_seeds))
    exploration = Exploration(0, space, "stratified", LOW, HIGH)
    trials = lab.measure([exploration.recipe(i) for i in range(arguments.trials)], lab.seeds.search)
    near = [random_recipe_near(space, BAND, 99, i, tolerance=0.05) for i in range(arguments.extra)]
    further = lab.measure(near, lab.seeds.search)
    data, extra = (training_set(known, some, Goal.parse("sqnr_db")) for some in (trials, further))
    predictor = train_predictor(data, FAST, progress=progress)
    ratings = rate(predictor, known, extra=extra, around=BAND)
    rows = [
        {
            "predictor": r.predictor,
            "subset": r.subset,
            **{k: to_plain(getattr(r, k)) for k in QUALITIES},
        }
        for r in ratings
    ]
    ahead = {f"{r.predictor} | {r.subset}": to_plain(r.advantage) for r in ratings if r.advantage is not None}
    print("| subset | predictor | SRCC | mean absolute error [dB] |\n|---|---|---|---|")
    for row in rows:
        srcc, mae = row["srcc"], row["mae"]
        interval = f"{srcc['value']:.3f} [{srcc['low']:.3f}, {srcc['high']:.3f}]"
        print(f"| {row['subset']} | {row['predictor']} | {interval} | {mae['value']:.2f} |")
    for name, found in ahead.items():
        print(f"this predictor minus {name}: SRCC {found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"rows": rows, "ahead": ahead}, indent=1) + "\n")


if __name__ == "__main__":
    main()
