"""Verbs that join several stages: load, trace, fit, explore, quantize, report.

Each is a plain function from records to a record. They add the context that inner errors lack and choose
sensible defaults; what they decide about numbers is written in the records.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sedimo.allocation.frontier import even_budgets, frontier
from sedimo.allocation.problem import Allocation
from sedimo.api.additivity import check_additivity, whole_recipes
from sedimo.api.describing import card_writer
from sedimo.api.predicting import know
from sedimo.bank import SILENT, Bank, Progress, fit_bank
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph
from sedimo.graph.trace import trace_denoiser
from sedimo.measurement import campaign
from sedimo.measurement.exploration import Exploration
from sedimo.measurement.study import Study
from sedimo.measurement.trial import ObjectiveName
from sedimo.measurement.worker import TrialWorker, setting_of
from sedimo.pipelines.adapter import Sampling, WeightSource
from sedimo.pipelines.diffusers import BareDenoiser, DiffusersPipeline
from sedimo.pipelines.loading import Source, load_pipeline
from sedimo.pipelines.sources import is_hub_id
from sedimo.pipelines.trajectory import record
from sedimo.pipelines.weights import FileWeights, ModuleWeights, denoiser_folder, refuse_adapters, refuse_changed
from sedimo.quant import memory
from sedimo.quant.formats import Format
from sedimo.reporting.building import frontier_points, summarize
from sedimo.reporting.html import write_report
from sedimo.reporting.summary import Evidence
from sedimo.runtime.contents import refuse_unfit_source
from sedimo.runtime.smoothed import smoothed_layers
from sedimo.runtime.weights import replace_weights
from sedimo.sensitivity.table import SensitivityTable
from sedimo.space import Recipe, SearchSpace, search_space

N_FRONTIER_POINTS = 24
Loaded = DiffusersPipeline | BareDenoiser
RecipeLike = Recipe | Mapping[str, str | Format]


def load(
    source: Source,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
) -> Loaded:
    """A pipeline from a diffusers folder, a hub id, `zoo:NAME`, or an object that is loaded already.

    The dtype is float32 on the CPU and the checkpoint's on a GPU unless given.

    Raises:
        InputError: nothing there, no denoiser, weights that could only be unpickled, unknown device or dtype.
        StateError: a damaged file.
        MissingExtraError: `zoo:` without the package sedimo-zoo.

    Example:
        >>> pipe = sedimo.load("zoo:cifar-dit")
    """
    loaded = load_pipeline(source, device=device, dtype=dtype, variant=variant)
    name = str(source) if isinstance(source, str) and is_hub_id(source) else loaded.name
    loaded.finish_saving = card_writer(name, loaded.folder)
    return loaded


def trace(pipe: Loaded | nn.Module, *, example_inputs: Mapping[str, object] | None = None) -> DenoiserGraph:
    """The graph of a denoiser: its weight layers, how they are connected, blocks, groups, MACs.

    Inputs are found by argument name, else captured from one call of the pipeline, else `example_inputs`
    (argument name to tensor; only shapes and dtypes matter) must tell them.

    Raises:
        InputError: inputs that nobody knows, a network that cannot be exported, or one with an adapter (LoRA).
    """
    refuse_adapters(pipe if isinstance(pipe, nn.Module) else pipe.denoiser)
    if isinstance(pipe, DiffusersPipeline):
        return trace_denoiser(pipe.denoiser, example_inputs=example_inputs, capture=lambda: captured_inputs(pipe))
    denoiser = pipe.denoiser if isinstance(pipe, BareDenoiser) else pipe
    return trace_denoiser(denoiser, example_inputs=example_inputs)


def fit(
    pipe: Loaded | nn.Module,
    space: SearchSpace,
    *,
    sample_channels: int | None = None,
    cache: Path | str | None = None,
    progress: Progress = SILENT,
) -> Bank:
    """The bank: what each format does to each weight. With `cache`, work is kept in that folder and reused.

    `sample_channels` estimates errors from so many output channels of each weight (with their standard error)
    instead of fitting every format in full.

    Raises:
        InputError: a weight that holds NaN or infinity, or that does not fit the space.
    """
    weights = weights_of(pipe)
    return fit_bank(
        weights, space, sample_channels=sample_channels, cache=Path(cache) if cache else None, progress=progress
    )


def weights_of(pipe: Loaded | nn.Module) -> WeightSource:
    """The weights in the dtype they are stored in: from the files where there are any, else (or smoothed) from memory.

    Raises:
        InputError: weights that are quantized, carry an adapter, or are no longer those of their files.
    """
    if isinstance(pipe, DiffusersPipeline | BareDenoiser) and pipe.folder is not None and not pipe.is_quantized:
        weights = FileWeights(denoiser_folder(pipe.folder), pipe.variant)
        if not smoothed_layers(pipe.denoiser):
            refuse_changed(weights, pipe.denoiser)
            return weights
    return ModuleWeights(pipe if isinstance(pipe, nn.Module) else pipe.denoiser)


def explore(
    pipe: DiffusersPipeline,
    bank: Bank,
    *,
    store: Path | str,
    trials: int,
    objective: ObjectiveName = "final_latents",
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Study:
    """Measures random recipes and keeps them in a study; what is there already is not measured again.

    Recipe i is a function of (`seed`, i), stratified over bits. First-order noise, which predictors start from, is
    measured first. Safe to interrupt: the same call goes on where it was.

    Raises:
        InputError: a pipeline that cannot be sampled.
        StateError: the folder holds a study of another space or seed.
        Interrupted: Ctrl-C; what was measured is kept.
    """
    plan = sampling or pipe.default_sampling(range(8), 10)
    study = Study(store)
    know(pipe, trace(pipe), bank, study, sampling=plan)
    campaign.explore(
        study,
        Exploration(seed, bank.space, "stratified"),
        n_trials=trials,
        setting=setting_of(pipe, plan, weights_digest=bank.digest, objective=objective),
        make_worker=lambda: TrialWorker(pipe, bank, plan, objective=objective),
    )
    return study


def report(
    study: Study | None, table: SensitivityTable, choice: Allocation, *, path: Path | str, model: str = ""
) -> Path:
    """Writes the report of a choice as one HTML file and returns its path.

    With a study of measured recipes, the additivity of the table's costs is checked on them.

    Raises:
        InputError: the folder of `path` does not exist.
    """
    agreed = None if study is None else check_additivity(table, whole_recipes(study, table))
    evidence = Evidence(
        frontier=frontier_points(frontier(table, even_budgets(table, N_FRONTIER_POINTS), bops=choice.budget_bops)),
        agreement=agreed,
        agreement_of="" if agreed is None else f"{agreed.n} recipes of the study",
    )
    return write_report(summarize(table, choice, model=model or table.denoiser, evidence=evidence), path)


def quantize(pipe: Loaded | nn.Module, recipe: RecipeLike, *, bank: Bank | None = None) -> Loaded | nn.Module:
    """Replaces the weights that a recipe names by packed ones, in place, and returns `pipe`.

    `recipe` is a `Recipe` or a plain mapping of layer name to format text. Formats such as `uaq4a8` round the layer's
    inputs, too. With a `bank`, its fits and its rules for activations are used.

    Raises:
        InputError: an unknown layer, a format that is none, layers with equal weights and
            different formats, a bank of other weights, a weight that is packed already or carries an adapter.
    """
    wanted = recipe if isinstance(recipe, Recipe) else Recipe.from_mapping(recipe)
    denoiser = pipe if isinstance(pipe, nn.Module) else pipe.denoiser
    refuse_unfit_source(denoiser)
    if bank is None:
        space = search_space(trace(pipe), sorted({str(f) for f in wanted.formats} | {"fp16"}))
        bank = Bank(weights_of(pipe), space, candidates=())
    else:
        refuse_changed(bank.weights, denoiser, layers=wanted.layers)
    bank.space.check(wanted)
    replace_weights(denoiser, bank.quantize(wanted), inputs=bank.input_quantizers(wanted))
    return pipe


def memory_bytes(model: nn.Module | Loaded) -> int:
    """The real memory of a model's parameters and buffers, packed ones as packed, shared ones once [bytes]."""
    return memory.memory_bytes(model if isinstance(model, nn.Module) else model.denoiser)


def captured_inputs(pipe: DiffusersPipeline) -> Mapping[str, object]:
    """The denoiser's inputs in one real call of the pipeline."""
    trajectory = record(pipe, pipe.default_sampling([0], 1), at_most=1)
    if not trajectory.calls:
        raise InputError(f"the pipeline {pipe.name} did not call its denoiser")
    return trajectory.calls[0].inputs
