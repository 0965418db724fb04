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
from dataclasses import replace
from pathlib import Path

import numpy as np

from sedimo.api.measuring import make_bank
from sedimo.api.opening import open_source
from sedimo.api.order import BudgetOrder, Order, SamplingOrder
from sedimo.api.predicting import judge, know, measures_of, training_set
from sedimo.api.searching import Measuring
from sedimo.cli.console import ConsoleProgress
from sedimo.codec import to_plain
from sedimo.measurement.exploration import Exploration, random_recipe_near
from sedimo.measurement.study import Study
from sedimo.measurement.target import Target
from sedimo.sensitivity.gnn.training import FAST, train_predictor

LOW, HIGH, BAND, HALF_WIDTH = 3.0, 5.0, 4.0, 0.25
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
    progress, sampling = ConsoleProgress(), SamplingOrder(guidance=arguments.guidance)
    order = Order(arguments.source, None, BudgetOrder(bits=BAND), sampling=sampling)
    opened = replace(open_source(order), is_compensated=arguments.compensate)
    pipe = opened.pipe
    with Study(arguments.run) as study:
        bank = make_bank(opened, study, is_exact=True, progress=progress)
        wide = sampling.sampling_many(pipe, sampling.n_adjoint)
        known = know(pipe, opened.graph, bank, study, prior="adjoint", sampling=wide, progress=progress)
        on_search = Measuring.on(pipe, bank, study, sampling.searching(pipe), progress=progress)
        exploration = Exploration(0, bank.space, "stratified", LOW, HIGH)
        trials = on_search.trials([exploration.recipe(i) for i in range(arguments.trials)])
        near = [random_recipe_near(bank.space, BAND, 99, i, tolerance=0.05) for i in range(arguments.extra)]
        extra = on_search.trials(near)
    data = training_set(known, trials, Target.parse("sqnr_db"))
    predictor = train_predictor(data, FAST, progress=progress)
    truth = np.array([measures_of(t, known.space)["sqnr_db"] for t in extra])
    codes = known.choices.codes([t.recipe for t in extra])
    report = judge(predictor, data, known, extra=(codes, truth), band=(BAND - HALF_WIDTH, BAND + HALF_WIDTH))
    rows = [{"predictor": n, "subset": s, **{k: to_plain(getattr(q, k)) for k in QUALITIES}} for n, s, q in report.rows]
    ahead = {f"{n} | {s}": to_plain(d) for (n, s), d in report.differences.items()}
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
