"""Do final latents and FID rank operations alike, and which recipes do they lead to?

    sedimo explore zoo:cifar-dit --store runs/fid --objective fid --seeds 500 --dtype bf16 --trials 100 --formats paper
    python benchmarks/objectives.py --run runs/fid [--source zoo:cifar-dit] [--bits 3.5] [--images 2000]

Every trial of that study has both: the SQNR of its final latents and the FID of its images, from the same 500 seeds.
Effects of operations are regressed from halves of the recipes, so that the agreement of two objectives stands beside
the agreement of each with itself. Then each objective builds recipes, which are measured by both on other seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import stats

import sedimo
from _suite.signal import summarize
from sedimo.allocation.budget import BudgetSettings, allocated
from sedimo.cli.console import ConsoleProgress
from sedimo.codec import to_plain
from sedimo.lab.exchange import Prober
from sedimo.lab.images import draw
from sedimo.lab.lab import Lab
from sedimo.lab.measuring import TrialWorker
from sedimo.lab.study import Study
from sedimo.methods.predictor.features import picked
from sedimo.methods.predictor.goal import Goal
from sedimo.methods.predictor.noise_model import fit_noise_model
from sedimo.methods.predictor.study import measure_background, measures_of, training_set, trials_of
from sedimo.methods.predictor.training import FAST, train_predictor
from sedimo.methods.search import build, model_table

TARGETS = {"sqnr": "sqnr_db", "fid": "-fid"}
N_SPLITS, PENALTY = 400, 1.0
SHOWN = range(48)


def effects(bits: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """What one more bit of each operation does to the quality, by ridge regression; `bits` `[T, O]` per weight."""
    x, y = bits - bits.mean(axis=0), quality - quality.mean()
    return np.linalg.solve(x.T @ x + PENALTY * np.eye(x.shape[1]) * x.var(axis=0).mean(), x.T @ y)


def operation_bits(data, operations: list[str]) -> np.ndarray:
    """Average bits of the operations in every recipe, `[T, O]`."""
    choices = data.choices
    sizes = picked(choices.paper_bytes * 8.0, data.codes)
    params = np.array([d.params for d in choices.space.decisions], dtype=float)
    of = np.array([operations.index(d.operation) for d in choices.space.decisions])
    return np.stack([sizes[:, of == o].sum(axis=1) / params[of == o].sum() for o in range(len(operations))], axis=1)


def agreements(bits: np.ndarray, quality: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Kendall's tau of effects from two halves of the recipes, by pair of objectives, over random halves."""
    generator, n = np.random.default_rng(0), len(bits)
    found: dict[str, list[float]] = {"sqnr, sqnr": [], "fid, fid": [], "sqnr, fid": []}
    for _ in range(N_SPLITS):
        order = generator.permutation(n)
        halves = (order[: n // 2], order[n // 2 :])
        by = {name: [effects(bits[h], y[h]) for h in halves] for name, y in quality.items()}
        for pair, taus in found.items():
            one, other = pair.split(", ")
            taus.append(float(stats.kendalltau(by[one][0], by[other][1]).statistic))
    return {
        pair: {"mean": float(np.mean(t)), "low": float(np.quantile(t, 0.025)), "high": float(np.quantile(t, 0.975))}
        for pair, t in found.items()
    }


def shares(known, data) -> dict[str, float]:
    """Each operation's share of the noise that a model of the target predicts, mean over the recipes."""
    model = fit_noise_model(data.choices, data.prior, data.codes, data.quality)
    powers, found = np.exp(picked(model.log_costs, data.codes)), {}
    each = (powers / (powers.sum(axis=1, keepdims=True) + model.floor)).mean(axis=0)
    for share, decision in zip(each, known.space.decisions, strict=True):
        found[decision.operation] = found.get(decision.operation, 0.0) + float(share)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--source", default="zoo:cifar-dit")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--bits", type=float, default=3.5)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives.json"))
    arguments = parser.parse_args()
    progress = ConsoleProgress()
    pipe = sedimo.load(arguments.source, dtype=arguments.dtype)
    with Study(arguments.run, create=False) as study:
        graph = sedimo.trace(pipe)
        bank = sedimo.fit(pipe, sedimo.search_space(graph, "paper"), cache=arguments.run, progress=progress)
        lab = Lab(pipe, bank, graph=graph, study=study, progress=progress)
        known = measure_background(lab, on=pipe.default_sampling(range(16), 10))
        trials = trials_of(study, known, "fid")
        data = {name: training_set(known, trials, Goal.parse(text)) for name, text in TARGETS.items()}
        found = compare_rankings(known, trials, data)
        print(json.dumps(found, indent=1), flush=True)
        found["recipes"] = compare_recipes(arguments, (pipe, bank, known, study, progress), data)
        arguments.out.write_text(json.dumps(found, indent=1))


def compare_rankings(known, trials, data) -> dict[str, object]:
    """How the objectives agree on recipes and on operations."""
    measures = [measures_of(t, known.space) for t in trials]
    quality = {name: one.quality for name, one in data.items()}
    operations = list(dict.fromkeys(d.operation for d in known.space.decisions))
    bits = operation_bits(data["sqnr"], operations)
    average = np.array([m["avg_bits"] for m in measures])
    residual = {n: y - np.polyval(np.polyfit(average, y, 1), average) for n, y in quality.items()}
    error = np.array([t.measures["fid"].standard_error for t in trials])
    by_model = {name: shares(known, one) for name, one in data.items()}
    both = np.array([[by_model[n][o] for o in operations] for n in TARGETS])
    return {
        "n_recipes": len(trials),
        "n_images": trials[0].measures["fid"].n,
        "fid": {"least": float(-quality["fid"].max()), "most": float(-quality["fid"].min())},
        "srcc_of_recipes": float(stats.spearmanr(quality["sqnr"], quality["fid"]).statistic),
        "srcc_of_recipes_given_bits": float(stats.spearmanr(residual["sqnr"], residual["fid"]).statistic),
        "share_of_fid_variance_from_measuring": float((error**2).mean() / quality["fid"].var()),
        "tau_of_operations_from_halves": agreements(bits, quality),
        "effects_per_bit": {
            n: dict(zip(operations, effects(bits, y).tolist(), strict=True)) for n, y in quality.items()
        },
        "shares_of_noise": by_model,
        "tau_of_shares": float(stats.kendalltau(*both).statistic),
    }


def compare_recipes(arguments, tools, data) -> dict[str, object]:
    """The recipe of each objective, measured on other seeds by both, and pictures of them for the eye."""
    pipe, bank, known, study, progress = tools
    budget = BudgetSettings(bits=arguments.bits)
    recipes = {"jacobian": allocated(known.table, budget).recipe}
    for name, one in data.items():
        model = fit_noise_model(one.choices, one.prior, one.codes, one.quality)
        recipes[f"{name}, noise model"] = allocated(model_table(known, model.log_costs), budget).recipe
        predictor = train_predictor(one, FAST, progress=progress)
        recipes[f"{name}, predictor"] = build(known, predictor, budget, confidence=1.0)[1].recipe
    plan = pipe.default_sampling(range(100_000, 100_000 + arguments.images), 10)
    worker = TrialWorker(pipe, bank, plan, objective="fid")
    found = {}
    for name, recipe in recipes.items():
        trial = study.trial(worker.setting.trial_key(recipe)) or worker.measure(recipe)
        study.put_trial(trial)
        found[name] = {
            "paper_bits": known.space.paper_bits(recipe),
            "sqnr": to_plain(summarize(trial.powers)),
            **{k: to_plain(v) for k, v in trial.measures.items()},
        }
        print(name, json.dumps(found[name]), flush=True)
    worker.close()
    show(arguments, pipe, bank, recipes)
    return found


def show(arguments, pipe, bank, recipes) -> None:
    """A sheet of samples per recipe beside the JSON, the same seeds in the same places."""
    plan = pipe.default_sampling(SHOWN, 20)
    sheets = {"full precision": draw(pipe, plan).images}
    with Prober(pipe.denoiser, bank) as prober:
        for name, recipe in recipes.items():
            prober.switch(recipe)
            sheets[name] = draw(pipe, plan).images
    for name, images in sheets.items():
        pixels = (images.float().clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
        rows = [np.concatenate(list(pixels[i : i + 12]), axis=1) for i in range(0, len(pixels), 12)]
        sheet = Image.fromarray(np.concatenate(rows))
        sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(
            arguments.out.with_name(f"{arguments.out.stem}-{name.replace(', ', '-').replace(' ', '-')}.png")
        )


if __name__ == "__main__":
    main()
