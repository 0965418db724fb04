"""A lab in another process: what it needs to know to become one, and the worker that it then is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sedimo.bank import fit_bank
from sedimo.lab.bench import Bench
from sedimo.lab.lab import Lab
from sedimo.lab.subject import SourceSettings, Subject
from sedimo.lab.trial import ObjectiveName
from sedimo.lab.worker import TrialWorker
from sedimo.pipelines.adapter import Sampling


@dataclass(frozen=True)
class Replica:
    """The subject of a lab with its treatments, where its bank is kept, and what is measured how."""

    subject: Subject
    cache: Path | None
    on: Sampling
    objective: ObjectiveName

    @classmethod
    def of(cls, lab: Lab, on: Sampling, objective: ObjectiveName) -> Replica:
        """What another process needs to measure recipes as this lab does."""
        return cls(replace(lab.subject, space=lab.bank.space), lab.cache, on, objective)


def make_worker(replica: Replica) -> TrialWorker:
    """A worker with a pipeline and a bank of its own.

    Raises:
        InputError: the pipeline is gone since the lab was opened.
    """
    subject = replica.subject
    bench = Bench.open(SourceSettings(str(subject.folder), subject.variant, subject.compute))
    lab = Lab(subject, bench)
    bank = fit_bank(lab.weights, subject.space, cache=replica.cache)
    for treatment in subject.treatments:
        bank = treatment.on(bank)
    return TrialWorker(lab.pipe, bank, replica.on, objective=replica.objective)
