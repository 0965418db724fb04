"""The public verbs that join several stages: what `import sedimo` offers besides records and single stages."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar, overload

import torch
from torch import nn

from sedimo.allocation.solve import Allocation
from sedimo.allocation.table import SensitivityTable
from sedimo.bank import Bank, fit_bank
from sedimo.checkpoint.contents import refuse_unfit_source
from sedimo.checkpoint.weights import replace_weights
from sedimo.checkpoint.writing import Origin, WriteOptions, WrittenCheckpoint
from sedimo.errors import InputError
from sedimo.jobs.attribute import AttributeSettings, attribute_study
from sedimo.jobs.check import check_additivity, whole_recipes
from sedimo.jobs.describe import card_writer
from sedimo.jobs.evidence import frontier_points
from sedimo.jobs.explore import EXPLORATION
from sedimo.jobs.quantize import JOB, JobResult
from sedimo.lab.bench import Compute, Loaded, SourceSettings, trace, weights_of
from sedimo.lab.exploration import Exploration
from sedimo.lab.lab import Lab as BenchLab
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import ObjectiveName, Study
from sedimo.methods import method_named
from sedimo.methods.auto import AUTO
from sedimo.methods.error import describe
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import Finding, Task
from sedimo.methods.predictor.study import measure_background
from sedimo.methods.search import SEARCH
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.loading import Source, is_hub_id, load_pipeline
from sedimo.pipelines.weights import refuse_changed
from sedimo.progress import SILENT, Progress
from sedimo.quant import tensor
from sedimo.quant.formats import Format
from sedimo.reporting.html import write_page
from sedimo.reporting.report_page import report_page
from sedimo.reporting.summary import Evidence, Summary
from sedimo.space import Recipe, SearchSpace, search_space
from sedimo.targets import target_named
from sedimo.targets.diffusers import DIFFUSERS
from sedimo.targets.target import Packed

RecipeLike = Recipe | Mapping[str, str | Format]
Model = TypeVar("Model", bound=Loaded | nn.Module)


class Lab(BenchLab):
    """One model on the bench, step by step: tables of costs, measured recipes, a smaller checkpoint.

    `source` is a diffusers folder, a hub id, `zoo:NAME`, or a pipeline that is loaded already. With `store`, a folder,
    all that is measured is kept there, and the same calls go on where they were.

    Raises:
        InputError: a source that cannot be used, formats that are none.
        StateError: a damaged file, or a `store` that holds something else.

    Example:
        >>> lab = sedimo.Lab("zoo:cifar-dit", store="runs/alpha")
        >>> choice = sedimo.allocate(lab.table("jacobian"), bits=3.7)
        >>> lab.write(choice, out="small")
    """

    def __init__(
        self,
        source: str | Path | DiffusersPipeline,
        *,
        store: Path | str | None = None,
        formats: str = "wide",
        sampling: SamplingSettings | None = None,
        variant: str | None = None,
        compute: Compute | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """Opens the source; the pipeline is loaded when it is first needed."""
        if isinstance(source, DiffusersPipeline):
            super().__init__(source, formats=formats, sampling=sampling, progress=progress)
            self.bench.compute = compute or self.bench.compute  # of further processes
        else:
            named = SourceSettings(str(source), variant, compute or Compute())
            super().__init__(named, formats=formats, sampling=sampling, progress=progress)
        _ = self.space  # refuses what cannot be decided before there is a store
        self.study = None if store is None else Study(store)

    def __enter__(self) -> Lab:
        """The lab; with `with`, its store is closed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the store."""
        if self.study is not None:
            self.study.close()

    def table(self, method: str = AUTO.name, *, knobs: object = None) -> SensitivityTable:
        """The cost of every format for every layer, by a method; `knobs` is the method's own record of settings.

        Raises:
            InputError: an unknown method, or a source that cannot be sampled.
            Interrupted: Ctrl-C; with a store, what was measured is kept.
        """
        found, number_format = method_named(method)
        task = Task(knobs or found.knobs(), number_format=number_format)
        if found.resolve is not None:
            resolved = found.resolve(self, task)
            found, task = resolved.method, resolved.task
        return found.measure(self, task).table

    def write(
        self, choice: Allocation | Recipe, out: Path | str, *, target: str = DIFFUSERS.name, link: bool = False
    ) -> WrittenCheckpoint:
        """Writes the checkpoint of a choice into a new folder, whole or not at all.

        Raises:
            InputError: `out` exists, or the recipe does not fit the model.
        """
        recipe = choice if isinstance(choice, Recipe) else choice.recipe
        bank = self.any_bank
        bank.space.check(recipe)
        method = choice.method if isinstance(choice, Allocation) else "a given recipe"
        origin = Origin(base_model=self.bench.name, method=method, recipe_json=recipe.to_json())
        packed = Packed(self, bank, recipe, bank.quantize(recipe), origin)
        options = WriteOptions(link=link, variant=self.bench.variant)
        return target_named(target).write_verified(packed, Path(out), options)


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
    place = Path(cache) if cache else None
    return fit_bank(weights_of(pipe), space, sample_channels=sample_channels, cache=place, progress=progress)


@overload
def quantize(
    source: str | Path,
    recipe: RecipeLike | str | Path | None = None,
    *,
    bank: None = None,
    progress: Progress = SILENT,
    **words: object,
) -> JobResult: ...


@overload
def quantize(source: Model, recipe: RecipeLike, *, bank: Bank | None = None, progress: Progress = SILENT) -> Model: ...


def quantize(
    source: str | Path | Loaded | nn.Module,
    recipe: RecipeLike | str | Path | None = None,
    *,
    bank: Bank | None = None,
    progress: Progress = SILENT,
    **words: object,
) -> JobResult | Loaded | nn.Module:
    """The main job: writes a smaller checkpoint of `source` under a budget, with a report that says why.

    `words` are those of the command `sedimo quantize`, dashes as underscores: `out`, `bits`, `stored_bits`, `bytes`,
    `bops`, `method`, `formats`, `seeds`, `steps`, `store`, `smooth`, ... (see the reference of the command line).

    With a loaded pipeline and a recipe it does what `replace` does; that use ends with the next release.

    Raises:
        InputError: a word that there is not, a budget that cannot be kept, or an `out` that exists.
        StateError: a damaged source, or a study folder that holds another study.
        Interrupted: Ctrl-C; what was measured is kept, the same call goes on.

    Example:
        >>> sedimo.quantize("zoo:cifar-dit", bits=3.5, out="small").allocation.paper_bits
    """
    if isinstance(source, str | Path):
        if recipe is not None:
            words["recipe"] = str(recipe) if isinstance(recipe, str | Path) else _recipe(recipe)
        return JOB.run(JOB.read({"source": str(source), **words}), progress)
    if recipe is None or isinstance(recipe, str | Path):
        raise InputError("the main job takes a folder, a hub id or zoo:NAME; for a loaded pipeline use sedimo.Lab")
    _warn("sedimo.quantize(pipe, recipe)", "sedimo.replace(pipe, recipe)")
    return replace(source, recipe, bank=bank)


def _recipe(given: RecipeLike) -> Recipe:
    return given if isinstance(given, Recipe) else Recipe.from_mapping(given)


def replace(pipe: Model, recipe: RecipeLike, *, bank: Bank | None = None) -> Model:
    """Replaces the weights that a recipe names by packed ones, in place, and returns `pipe`.

    `recipe` is a `Recipe` or a plain mapping of layer name to format text. Formats such as `uaq4a8` round the layer's
    inputs, too. With a `bank`, its fits and its rules for activations are used.

    Raises:
        InputError: an unknown layer, a format that is none, layers with equal weights and
            different formats, a bank of other weights, a weight that is packed already or carries an adapter.

    Example:
        >>> sedimo.replace(pipe, {"proj_out_2": "uaq8"})
    """
    wanted = _recipe(recipe)
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
        frontier=frontier_points(table, choice),
        agreement=agreed,
        agreement_of="" if agreed is None else f"{agreed.n} recipes of the study",
    )
    return write_page(report_page(Summary(model or table.denoiser, table, choice, evidence=evidence)), path)


def memory_bytes(model: nn.Module | Loaded) -> int:
    """The real memory of a model's parameters and buffers, packed ones as packed, shared ones once [bytes]."""
    return tensor.memory_bytes(model if isinstance(model, nn.Module) else model.denoiser)


def probe(
    pipe: DiffusersPipeline,
    bank: Bank,
    method: str = JACOBIAN.name,
    *,
    store: Path | str | Study,
    sampling: Sampling | None = None,
    progress: Progress = SILENT,
) -> Finding:
    """What a method measures on a loaded pipeline; `sedimo.Lab(pipe, store=...).table(method)` replaces it."""
    _warn("sedimo.probe(pipe, bank, method)", "sedimo.Lab(pipe, store=...).table(method)")
    found, number_format = method_named(method)
    with nullcontext(store) if isinstance(store, Study) else Study(store) as study:
        lab = BenchLab(pipe, bank, study=study, progress=progress)
        return found.measure(lab, Task(found.knobs(), number_format=number_format, on=sampling))


def attribute(source: Bank | Finding | Study, method: str = "") -> SensitivityTable:
    """The costs of a bank, of a finding, or of a study of measured recipes; `sedimo.Lab(...).table` replaces it."""
    _warn("sedimo.attribute", "sedimo.Lab(...).table(method)")
    found = describe(source) if isinstance(source, Bank) else source
    given = SEARCH.name if isinstance(found, Study) else found.table.method
    if method not in ("", given):
        raise InputError(f"method {method!r} cannot be had from this {type(source).__name__}; {given!r} can")
    if isinstance(found, Study):
        return attribute_study(found, AttributeSettings(found.path.parent)).table
    return found.table


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
    """Measures random recipes and keeps them in a study; `sedimo explore` or `lab.measure` replaces it."""
    _warn("sedimo.explore", "sedimo.Lab(pipe, store=...).measure(recipes, on=...)")
    study = Study(store)
    lab = BenchLab(pipe, bank, study=study)
    on = sampling or pipe.default_sampling(range(8), 10)
    measure_background(lab, on=on)
    exploration = Exploration(seed, bank.space, "stratified")
    study.claim(EXPLORATION, exploration)
    lab.measure([exploration.recipe(index) for index in range(trials)], on, objective=objective)
    return study


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} ends with the next release; use {new}", DeprecationWarning, stacklevel=3)
