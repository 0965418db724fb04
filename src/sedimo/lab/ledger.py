"""What a piece of work took, from what it used: the same whether that was measured now, before, or by other work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sedimo.lab.trial import Execution, Trial


@dataclass
class Ledger:
    """Trials, and executions of parts of probes (None: not kept), that were asked for, each once, by key.

    `measuring_seconds` were spent measuring now: what is left of a clock's time is neither theirs nor kept anywhere.
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
    by_setting: dict[str, list[Execution]] = {}
    for trial in trials.values():
        by_setting.setdefault(trial.setting.key, []).append(trial.execution)
    known = [execution for execution in parts.values() if execution is not None]
    for alike in by_setting.values():
        reference = Execution(sum(e.seconds for e in alike) / len(alike), alike[0].n_calls, alike[0].threads, {})
        known += [*alike, reference]
    return Spent(sum(e.seconds for e in known), sum(e.n_calls for e in known), None not in parts.values())
