"""The trials of a study as one canonical text: what was measured and of what, never when, where or how fast.

Two studies of the same trials have the same text, however often either was interrupted. One trial stands on each
line, so that two exports can be compared line by line.
"""

from __future__ import annotations

from sedimo.codec import to_json
from sedimo.lab.study import Study
from sedimo.lab.trial import Trial
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import sqnr_estimates, summarize

EXPORT_VERSION = 1


def export_trials(study: Study) -> str:
    """One JSON document: `settings` by key, then `trials` sorted by key.

    A trial has its `key`, the key of its `setting`, its `recipe` (format text by layer), its `measures` by name (value,
    standard_error, low, high, n; beside them the counts `n_exact` and `n_decorrelated`) and its `powers` by sample, in
    the order of the setting's seeds.
    """
    trials = study.trials()
    settings = {trial.setting.key: trial.setting for trial in trials}
    lines = ",\n".join(to_json(_exported(trial)) for trial in sorted(trials, key=lambda trial: trial.key))
    head = f'"sedimo_trials":{EXPORT_VERSION},\n"settings":{to_json(settings)}'
    return f'{{{head},\n"trials":[\n{lines}\n]}}\n'


def measures_of(trial: Trial) -> dict[str, Estimate]:
    """All measures of a trial by name; SQNR [dB] by the mean over samples and pooled."""
    return {**sqnr_estimates(summarize(trial.powers)), **trial.measures}


def _exported(trial: Trial) -> dict[str, object]:
    sqnr = summarize(trial.powers)
    counts = {"n_exact": sqnr.n_exact, "n_decorrelated": sqnr.n_decorrelated}
    return {
        "key": trial.key,
        "setting": trial.setting.key,
        "recipe": trial.recipe.layers,
        "measures": {**measures_of(trial), **counts},
        "powers": trial.powers,
    }
