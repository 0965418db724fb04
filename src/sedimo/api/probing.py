"""Measuring single decisions, and the tables that follow: the verb `probe`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sedimo.bank import SILENT, Bank, Progress
from sedimo.errors import InputError
from sedimo.graph.model import Group
from sedimo.measurement.adjoint import AdjointOptions, AdjointProbe, probe_adjoint
from sedimo.measurement.campaign import run_trials
from sedimo.measurement.jacobian import JacobianProbe, probe_jacobian
from sedimo.measurement.orthogonality import OrthogonalityProbe, probe_orthogonality
from sedimo.measurement.sqnr import SqnrProbe, probe_sqnr
from sedimo.measurement.study import Study
from sedimo.measurement.worker import TrialWorker, setting_of
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.sensitivity.ablation import DEFAULT_BITS, AblationProbe, Measured, ablation_table, plan_probes
from sedimo.sensitivity.adjoint import adjoint_table
from sedimo.sensitivity.error import error_table
from sedimo.sensitivity.jacobian import jacobian_table
from sedimo.sensitivity.orthogonality import DEFAULT_IMPORTANCE, ImportanceOptions, orthogonality_table
from sedimo.sensitivity.sqnr import sqnr_table
from sedimo.sensitivity.table import SensitivityTable

ProbeMethod = Literal["adjoint", "jacobian", "ablation", "sqnr", "orthogonality"]


@dataclass(frozen=True)
class Probe:
    """What was measured about single decisions, with the bank that it is about.

    The field of the method is filled.
    """

    method: ProbeMethod
    bank: Bank
    adjoint: AdjointProbe | None = None
    jacobian: JacobianProbe | None = None
    ablation: tuple[Measured, ...] = ()
    sqnr: SqnrProbe | None = None
    orthogonality: OrthogonalityProbe | None = None


@dataclass(frozen=True, slots=True)
class AblationOptions:
    """Around which paper bits each decision is probed, and the groups to probe as one (none: every decision)."""

    near_bits: tuple[float, ...] = DEFAULT_BITS
    groups: tuple[Group, ...] = ()


N_SAMPLES = 8
N_DIRECTIONS, N_DIRECTIONS_COMPENSATED = 4, 2  # of adjoint: compensated errors add up less, so fewer tell enough
LEAST_SAMPLES: Mapping[str, int] = {"adjoint": 32, "sqnr": 64, "orthogonality": 32}  # of methods that need more
DEFAULT_ABLATION = AblationOptions()


def probe(
    pipe: DiffusersPipeline,
    bank: Bank,
    method: ProbeMethod = "jacobian",
    *,
    store: Path | str | Study,
    sampling: Sampling | None = None,
    ablation: AblationOptions = DEFAULT_ABLATION,
    progress: Progress = SILENT,
) -> Probe:
    """Measures what each decision does to the denoiser, and keeps it in the study `store`; resumes there.

    `adjoint` takes the first-order effects of all formats on the final latents, through the whole sampling run;
    `jacobian` takes the first-order noise on the denoiser's output at each step; `ablation` quantizes each
    decision alone at a few formats and samples; `sqnr` takes the noise of all formats at the layers' own outputs;
    `orthogonality` compares the outputs of all layers between at least four samples. Without `sampling`, there are
    8 samples, 32 for `adjoint`, 64 for `sqnr`, 32 for `orthogonality`.

    Raises:
        InputError: another method, or a pipeline that cannot be sampled.
        Interrupted: Ctrl-C; what was measured is kept.
    """
    if not isinstance(pipe, DiffusersPipeline):
        raise InputError(
            "a denoiser without its pipeline cannot be sampled: load the whole pipeline, or attribute the bank"
        )
    plan = sampling or pipe.default_sampling(range(LEAST_SAMPLES.get(method, N_SAMPLES)), 10)
    if isinstance(store, str | Path):
        with Study(store) as study:
            return probe(pipe, bank, method, store=study, sampling=plan, ablation=ablation, progress=progress)
    if method == "adjoint":
        options = AdjointOptions(n_directions=N_DIRECTIONS if bank.moments is None else N_DIRECTIONS_COMPENSATED)
        return Probe(
            method, bank, adjoint=probe_adjoint(pipe, bank, plan, options=options, study=store, progress=progress)
        )
    if method == "jacobian":
        return Probe(method, bank, jacobian=probe_jacobian(pipe, bank, plan, study=store, progress=progress))
    if method == "sqnr":
        return Probe(method, bank, sqnr=probe_sqnr(pipe, bank, plan, study=store, progress=progress))
    if method == "orthogonality":
        return Probe(method, bank, orthogonality=_probe_orthogonality(pipe, bank, plan, store, progress))
    if method != "ablation":
        raise InputError(f"a probe is by 'adjoint', 'jacobian', 'ablation', 'sqnr' or 'orthogonality', got {method!r}")
    probes = plan_probes(bank.space, bank.candidates, near_bits=ablation.near_bits, groups=ablation.groups)
    return Probe(method, bank, ablation=measure_probes(pipe, bank, store, probes, (plan, progress)))


def _probe_orthogonality(
    pipe: DiffusersPipeline, bank: Bank, plan: Sampling, study: Study, progress: Progress
) -> OrthogonalityProbe:
    layers = [layer for weight in bank.space.weights for layer in weight.layers]
    return probe_orthogonality(pipe, layers, plan, weights_digest=bank.weights_digest, study=study, progress=progress)


def measure_probes(
    pipe: DiffusersPipeline,
    bank: Bank,
    study: Study,
    probes: Sequence[AblationProbe],
    plan: tuple[Sampling, Progress],
) -> tuple[Measured, ...]:
    """Each probe as a trial of the study, on the plan's seeds."""
    sampling, progress = plan
    trials = run_trials(
        study,
        [one.recipe(bank.space) for one in probes],
        setting=setting_of(pipe, sampling, weights_digest=bank.digest),
        make_worker=lambda: TrialWorker(pipe, bank, sampling, objective="final_latents"),
        progress=progress,
    )
    return tuple(Measured(one, trial.powers) for one, trial in zip(probes, trials, strict=True))


def attribute_measured(
    source: Bank | Probe, method: str = "", *, importance: ImportanceOptions = DEFAULT_IMPORTANCE
) -> SensitivityTable:
    """The cost of every choice: by `error` from a bank, by the method of a probe from a probe.

    `importance` holds the knobs of `orthogonality`.

    Raises:
        InputError: `method` is given and the source cannot give it.
    """
    known = "error" if isinstance(source, Bank) else source.method
    if method not in ("", known):
        remedy = "sedimo.probe measures adjoint, jacobian, ablation, sqnr and orthogonality, a bank gives error"
        raise InputError(f"method {method!r} cannot be had from this {type(source).__name__.lower()}: {remedy}")
    if isinstance(source, Bank):
        return error_table(source.space, source.candidates)
    space, candidates = source.bank.space, source.bank.candidates
    if source.adjoint is not None:
        return adjoint_table(space, candidates, source.adjoint)
    if source.jacobian is not None:
        return jacobian_table(space, candidates, source.jacobian)
    if source.sqnr is not None:
        return sqnr_table(space, candidates, source.sqnr)
    if source.orthogonality is not None:
        return orthogonality_table(space, candidates, source.orthogonality, importance)
    return ablation_table(space, candidates, source.ablation)
