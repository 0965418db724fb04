"""A study: trials and probes of one denoiser in one durable file, and the records that explain them.

A trial is one measured recipe: what determines the number, and the number per sample.
"""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Literal, TypeVar, get_args

import numpy as np
import torch

from sedimo.codec import content_key, to_json, to_plain
from sedimo.errors import InputError, StateError
from sedimo.metrics.estimate import Estimate, ranked
from sedimo.metrics.signal import NoisePowers, sqnr_estimates
from sedimo.settings import one_of
from sedimo.space import Recipe
from sedimo.store import Rows

ObjectiveName = Literal["final_latents", "path", "step", "fid"]
OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
TRIAL_VERSION = 1
EXPORT_VERSION = 1
FILE_NAME = "study.sqlite"
SPACE, GRAPH = "space", "graph"  # names of records: what the trials decide about
Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything but the recipe that determines a measured number; its key is part of every trial's name.

    `weights_digest` names the full-precision weights, `pipeline` what else draws the sample (class, scheduler,
    text encoders); `dtype` and `device` (kind only, `cpu` or `cuda`) are those the denoiser computes in. The batch
    size is not part of it: a sample does not depend on its batch. `extractor` names the network behind `fid`, and is
    None for objectives that look at no image.
    """

    weights_digest: str
    pipeline: str
    objective: ObjectiveName
    seeds: tuple[int, ...]
    n_steps: int
    conditions: tuple[str, ...]
    guidance: float | None
    resolution: int | None
    dtype: str
    device: str
    version: int = TRIAL_VERSION
    extractor: str | None = None

    def __post_init__(self) -> None:
        """Refuses another version's numbers and an unknown objective."""
        if self.version != TRIAL_VERSION:
            raise InputError(f"trials of version {self.version} cannot be compared; this Sedimo has {TRIAL_VERSION}")
        one_of(OBJECTIVES)(self.objective, "objective")

    @property
    def key(self) -> str:
        """Content key of the setting."""
        return content_key(self._named())

    @property
    def n_samples(self) -> int:
        """Samples behind each number."""
        return len(self.seeds)

    def trial_key(self, recipe: Recipe) -> str:
        """The name of the trial of a recipe under this setting: sha256 of all that determines its number."""
        return content_key({"setting": self._named(), "recipe": recipe.key})

    def _named(self) -> Mapping[str, object]:
        """What names it. An absent extractor is left out, so that older trials keep their names."""
        plain: dict[str, object] = to_plain(self)
        return {name: value for name, value in plain.items() if name != "extractor" or value is not None}


@dataclass(frozen=True, slots=True)
class Execution:
    """Where and how fast a number was made, in wall-clock time [s] and denoiser calls; no part of the number's name."""

    seconds: float
    n_calls: int
    threads: int
    versions: Mapping[str, str]

    @classmethod
    def here(cls, seconds: float, n_calls: int) -> Execution:
        """One in this process."""
        return cls(seconds, n_calls, torch.get_num_threads(), versions())


def versions() -> Mapping[str, str]:
    """Versions of what computes numbers."""
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in ("torch", "diffusers", "numpy")}}


@dataclass(frozen=True, slots=True)
class Trial:
    """A recipe with its noise and signal power per sample, in the order of the setting's seeds.

    The powers themselves are kept, so that two trials can be paired and jackknifed later. `measures` holds what is
    known of the samples as a set: `fid` and `kid` to real images, and their differences to full precision.
    """

    setting: Setting
    recipe: Recipe
    powers: NoisePowers
    execution: Execution
    measures: Mapping[str, Estimate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses powers of a part of the seeds."""
        if self.powers.n != len(self.setting.seeds):
            raise StateError(f"a trial of {len(self.setting.seeds)} seeds needs as many powers, got {self.powers.n}")

    @property
    def score(self) -> float:
        """Mean SQNR over samples [dB], by which trials are ranked; minus infinity where it is not a number."""
        with np.errstate(invalid="ignore"):  # exact samples beside diverged ones
            return ranked(float(self.powers.sqnr_db.mean()))

    @property
    def key(self) -> str:
        """Content key, the trial's name."""
        return self.setting.trial_key(self.recipe)


def measures_of(trial: Trial) -> dict[str, Estimate]:
    """All measures of a trial by name; SQNR [dB] by the mean over samples and pooled."""
    return {**sqnr_estimates(trial.powers), **trial.measures}


@dataclass
class Ledger:
    """Trials, and executions of parts of probes (None: not kept), that were asked for, each once, by key.

    So what work took is the same whether it was measured now, before, or by other work. `measuring_seconds` were spent
    measuring now.
    """

    trials: dict[str, Trial] = field(default_factory=dict)
    parts: dict[str, Execution | None] = field(default_factory=dict)
    measuring_seconds: float = 0.0

    def without(self, other: Ledger) -> Ledger:
        """What was asked for here and not in another."""
        trials = {key: trial for key, trial in self.trials.items() if key not in other.trials}
        parts = {key: execution for key, execution in self.parts.items() if key not in other.parts}
        return Ledger(trials, parts, self.measuring_seconds)


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds [s] and denoiser calls; more than that if not `is_complete`: of some parts nothing is kept."""

    seconds: float
    denoiser_calls: int
    is_complete: bool


def add_up(ledgers: Iterable[Ledger]) -> Spent:
    """What was used by any of them, each thing once.

    The full-precision samples that the trials of a setting are compared with count as one more trial of it.
    """
    trials: dict[str, Trial] = {}
    parts: dict[str, Execution | None] = {}
    for ledger in ledgers:
        trials |= ledger.trials
        parts |= ledger.parts
    used = [(e.seconds, e.n_calls) for e in (*parts.values(), *(t.execution for t in trials.values())) if e is not None]
    by_setting = defaultdict[str, list[Execution]](list)
    for trial in trials.values():
        by_setting[trial.setting.key].append(trial.execution)
    used += [(fmean(e.seconds for e in alike), alike[0].n_calls) for alike in by_setting.values()]
    return Spent(sum(seconds for seconds, _ in used), sum(n for _, n in used), None not in parts.values())


class Study:
    """An open study in a folder (`study.sqlite` inside) or a file named `*.sqlite`; a context manager.

    Kinds of rows: `trial` by content key, `probe` (parts of layer-wise measurements) by content key, `execution` (what
    a part took) by the same key, and named records (`space`, `candidates`, `graph`, a table ...) by name.

    Raises:
        InputError: `create` is false and there is none.
        StateError: the file is damaged, foreign, or of another version's layout.
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        """Opens the study, or creates it."""
        path = Path(path)
        self.path = path if path.suffix == ".sqlite" else path / FILE_NAME
        self._rows = Rows(self.path, create=create)
        self._ledgers: list[Ledger] = []

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._rows.close()

    def trials(self, setting: Setting | None = None) -> tuple[Trial, ...]:
        """All trials, or those of one setting, sorted by key."""
        found = self._rows.all(Trial, "trial")
        return tuple(trial for trial in found if setting is None or trial.setting == setting)

    def trial(self, key: str) -> Trial | None:
        """The trial of that name, or None when it has not been measured."""
        found = self._rows.get(Trial, "trial", key)
        if found is not None:
            for ledger in self._ledgers:
                ledger.trials[key] = found
        return found

    def trial_keys(self) -> frozenset[str]:
        """The names of all measured trials."""
        return frozenset(self._rows.keys("trial"))

    def put_trial(self, trial: Trial) -> None:
        """Saves a trial; durable when it returns."""
        self._rows.put("trial", trial.key, trial)

    def probe(self, kind: type[Record], key: str) -> Record | None:
        """The part of a layer-wise measurement (a frozen dataclass) saved under a content key, or None."""
        return self._rows.get(kind, "probe", key)

    def probe_keys(self) -> frozenset[str]:
        """The names of all saved parts of layer-wise measurements."""
        return frozenset(self._rows.keys("probe"))

    def put_probe(self, key: str, part: object) -> None:
        """Saves a part of a layer-wise measurement."""
        self._rows.put("probe", key, part)

    def account(self, key: str, measured: Execution | None = None) -> None:
        """Tells ledgers what a part took at first: what is kept of it, else `measured`, kept before the part is."""
        kept = self._rows.get(Execution, "execution", key)
        if kept is None and measured is not None:
            kept = measured
            self._rows.put("execution", key, kept)
        for ledger in self._ledgers:
            ledger.parts[key] = kept

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """Collects what is asked for inside: trials, and what parts of probes took."""
        ledger = Ledger()
        self._ledgers.append(ledger)
        try:
            yield ledger
        finally:
            self._ledgers.remove(ledger)

    def took(self, seconds: float) -> None:
        """Tells ledgers that so long was spent measuring [s]."""
        for ledger in self._ledgers:
            ledger.measuring_seconds += seconds

    def record(self, kind: type[Record], name: str) -> Record:
        """A named record, such as the search space.

        Raises:
            InputError: the study has no such record.
        """
        found = self._rows.get(kind, "record", name)
        if found is None:
            known = ", ".join(self.record_names()) or "none"
            raise InputError(f"the study {self.path} has no record {name!r}; it has: {known}")
        return found

    def record_names(self) -> tuple[str, ...]:
        """Names of the records, sorted."""
        return self._rows.keys("record")

    def has_record(self, name: str) -> bool:
        """Whether there is a record of that name."""
        return name in self.record_names()

    def put_record(self, name: str, record: object) -> None:
        """Saves a record under a name, in place of an older one."""
        self._rows.put("record", name, record)

    def claim(self, name: str, record: object) -> None:
        """Saves a record that must never change in this study; checks it when it is there already.

        Raises:
            StateError: the study was begun with another value.
        """
        saved = self._rows.text("record", name)
        if saved is None:
            self.put_record(name, record)
        elif saved != to_json(record):
            raise StateError(
                f"the study {self.path} was begun with another {name}; choose another folder or the same settings"
            )


def export_trials(study: Study) -> str:
    """The trials as one canonical JSON text: what was measured and of what, never when, where or how fast.

    `settings` by key, then `trials` sorted by key, one on each line, so that two exports can be compared line by line.
    A trial has its `key`, the key of its `setting`, its `recipe` (format text by layer), its `measures` by name (value,
    standard_error, low, high, n; beside them the counts `n_exact` and `n_decorrelated`) and its `powers` by sample, in
    the order of the setting's seeds.
    """
    settings, lines = dict[str, Setting](), list[str]()
    for trial in study.trials():
        settings[trial.setting.key] = trial.setting
        counts = {"n_exact": trial.powers.n_exact, "n_decorrelated": trial.powers.n_decorrelated}
        told = {"recipe": trial.recipe.layers, "measures": {**measures_of(trial), **counts}, "powers": trial.powers}
        lines.append(to_json({"key": trial.key, "setting": trial.setting.key, **told}))
    head, body = f'"sedimo_trials":{EXPORT_VERSION},\n"settings":{to_json(settings)}', ",\n".join(lines)
    return f'{{{head},\n"trials":[\n{body}\n]}}\n'
