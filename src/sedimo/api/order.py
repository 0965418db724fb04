"""What a person orders: a source, a budget, a method, how to sample. Checked before anything long starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict, get_args

from sedimo.api.bops_order import BopsOrder
from sedimo.api.keep_order import KeepOrder
from sedimo.api.search_order import SearchOrder
from sedimo.api.smooth_order import SmoothOrder
from sedimo.errors import InputError
from sedimo.measurement.calibration import CalibrationOptions
from sedimo.measurement.reconstruction import ReconstructionOptions
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.quant.formats import FULL_BITS, Format, parse_formats
from sedimo.sensitivity.orthogonality import DEFAULT_IMPORTANCE, ImportanceOptions
from sedimo.space import Recipe

Method = Literal[
    "auto", "error", "adjoint", "jacobian", "ablation", "combined", "sqnr", "orthogonality", "orthogonality-lp", "gnn"
]
METHODS: tuple[Method, ...] = get_args(Method)
UNIFORM, HYBRID, BY_LP = "uniform:", "hybrid:", "-lp"
MAX_BITS = 32
MAX_BYTES = 1 << 50


class BudgetNames(TypedDict):
    """A budget as keywords of allocation."""

    bits: float | None
    stored_bits: float | None
    budget_bytes: int | None
    budget_bops: int | None


@dataclass(frozen=True, slots=True)
class BudgetOrder:
    """A size, bit operations, or both; the size in paper bits or stored bits per weight, or in bytes."""

    bits: float | None = None
    stored_bits: float | None = None
    n_bytes: int | None = None
    bops: BopsOrder | None = None

    def __post_init__(self) -> None:
        """Refuses two sizes at once and budgets that no weight has."""
        given = [v for v in (self.bits, self.stored_bits, self.n_bytes) if v is not None]
        if len(given) > 1:
            raise InputError("give one size: --bits, --stored-bits or --bytes, got several")
        if given and not 0 < given[0] < float("inf"):
            raise InputError(f"a budget must be positive, got {given[0]}")
        if max(self.bits or 0, self.stored_bits or 0) > MAX_BITS or (self.n_bytes or 0) > MAX_BYTES:
            raise InputError(f"a budget of {given[0]:g} is beyond any model; weights have at most {MAX_BITS} bits")

    @property
    def has_size(self) -> bool:
        """Whether the size is limited."""
        return any(v is not None for v in (self.bits, self.stored_bits, self.n_bytes))

    @property
    def is_given(self) -> bool:
        """Whether there is a budget at all."""
        return self.has_size or self.bops is not None

    def named(self, full_bops: int) -> BudgetNames:
        """All of it by the names that allocation has, for a model of so many bit operations at 16 bits.

        Raises:
            InputError: a share of bit operations that are not known.
        """
        bops = None if self.bops is None else self.bops.resolved(full_bops)
        return {"bits": self.bits, "stored_bits": self.stored_bits, "budget_bytes": self.n_bytes, "budget_bops": bops}

    def in_bits(self, n_weights: int) -> float:
        """The size per weight [bits], in its own accounting.

        Raises:
            InputError: no size.
        """
        bits = self.bits if self.stored_bits is None else self.stored_bits
        if bits is None and self.n_bytes is None:
            raise InputError("a budget of size is needed: --bits 3.5 (or --stored-bits, --bytes)")
        return bits if bits is not None else 8 * (self.n_bytes or 0) / n_weights

    def __str__(self) -> str:
        """For people."""
        size = (
            f"{self.bits:g} paper bits per weight"
            if self.bits is not None
            else f"{self.stored_bits:g} stored bits per weight"
            if self.stored_bits is not None
            else f"{self.n_bytes} bytes"
        )
        parts = [*([size] if self.has_size else []), *([] if self.bops is None else [str(self.bops)])]
        return " and ".join(parts) or "no budget"


ADJOINT_FACTOR = 4  # samples of method adjoint per seed of the search
FINAL_FACTOR = 4  # seeds of the final per seed of the search
MOMENTS_OFFSET = 1_000_000  # from the first seed to those behind the moments of inputs
MOMENTS_FACTOR = 4  # samples behind the moments of inputs per seed of the search


@dataclass(frozen=True, slots=True)
class SamplingOrder:
    """How to sample while searching: `n_seeds` samples from `first_seed` on, `n_steps` each.

    The result is checked on `n_check_seeds` fresh seeds that follow the searched ones.
    """

    n_seeds: int = 8
    first_seed: int = 0
    n_steps: int = 10
    conditions: tuple[str, ...] = ()
    guidance: float | None = None
    resolution: int | None = None
    n_check_seeds: int = 16

    def __post_init__(self) -> None:
        """Refuses a guidance scale that is no number."""
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise InputError(f"the guidance scale must be a finite number, got {self.guidance}")

    @property
    def n_adjoint(self) -> int:
        """Samples whose runs are gone back through: products of few samples are cancelled by chance."""
        return ADJOINT_FACTOR * self.n_seeds

    def searching(self, pipe: DiffusersPipeline) -> Sampling:
        """The plan on which recipes are searched."""
        return self.plan(pipe, range(self.first_seed, self.first_seed + self.n_seeds))

    def checking(self, pipe: DiffusersPipeline) -> Sampling:
        """The plan on which the result is checked: seeds that the search has not seen."""
        first = self.first_seed + self.n_seeds
        return self.plan(pipe, range(first, first + self.n_check_seeds))

    def deciding(self, pipe: DiffusersPipeline) -> Sampling:
        """The plan on which a search decides among finalists: seeds that neither searching nor checking has seen."""
        first = self.first_seed + self.n_seeds + self.n_check_seeds
        return self.plan(pipe, range(first, first + FINAL_FACTOR * self.n_seeds))

    def sampling_many(self, pipe: DiffusersPipeline, n_samples: int) -> Sampling:
        """The plan for what takes at least `n_samples`: the searched seeds, and more past those of all other plans."""
        first = self.first_seed + (1 + FINAL_FACTOR) * self.n_seeds + self.n_check_seeds
        more = range(first, first + max(0, n_samples - self.n_seeds))
        return self.plan(pipe, (*range(self.first_seed, self.first_seed + self.n_seeds), *more))

    def compensating(self, pipe: DiffusersPipeline) -> Sampling:
        """The plan for the moments of inputs that error feedback goes by: seeds far past those of all other plans."""
        first = self.first_seed + MOMENTS_OFFSET
        return self.plan(pipe, range(first, first + MOMENTS_FACTOR * self.n_seeds))

    def plan(self, pipe: DiffusersPipeline, seeds: Sequence[int]) -> Sampling:
        """A plan for some seeds, with the pipeline's defaults where nothing was ordered."""
        default = pipe.default_sampling(seeds, self.n_steps)
        conditions = self.conditions or default.conditions
        guidance = default.guidance if self.guidance is None else self.guidance
        return replace(default, conditions=conditions, guidance=guidance, resolution=self.resolution)


@dataclass(frozen=True, slots=True)
class Compute:
    """Dtype (`fp32`, `bf16`, `fp16`) and device; None: float32 on the CPU, the checkpoint's dtype on a GPU."""

    dtype: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class ActivationOrder:
    """How the inputs of layers are rounded whose format asks for it.

    By the range of each token or image (dynamic), symmetric or not; or, with a `calibration`, by static ranges that are
    calibrated on `n_samples` of the model's own trajectories.

    Raises:
        InputError: no samples.
    """

    symmetric: bool = False
    calibration: CalibrationOptions | None = None
    n_samples: int = 64

    def __post_init__(self) -> None:
        """Refuses calibration on nothing."""
        if self.n_samples < 1:
            raise InputError(f"ranges are calibrated on at least one sample, got {self.n_samples}")

    def refuse_idle(self, formats: Iterable[Format]) -> None:
        """Refuses rules for activations where no format rounds any.

        Raises:
            InputError: saying what to add.
        """
        is_default = not self.symmetric and self.calibration is None
        if not is_default and all(f.activation_bits == FULL_BITS for f in formats):
            raise InputError(
                f"activations are to be {self}, but no format has activation bits. Add --act a8, or write formats such "
                "as uaq4a8; or leave out --act-ranges and --act-symmetric"
            )

    def __str__(self) -> str:
        """For people."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        if self.calibration is None:
            return f"{kind}, by each token's or image's own range"
        how = self.calibration
        steps = f"{how.n_steps or 'all'} steps" + (", for each of them" if how.by_timestep else "")
        return f"{kind}, static ranges by {how.method} at {steps}"


DEFAULT_COMPUTE = Compute()
DYNAMIC_ACTIVATIONS = ActivationOrder()
DEFAULT_SAMPLING = SamplingOrder()
DEFAULT_SEARCH = SearchOrder()


@dataclass(frozen=True, slots=True)
class Order:
    """One run of the main job.

    `recipe` and `method="uniform:kmc4"` need no budget; `method="hybrid:uaq4"` has one format for all but the blocks
    that stay at 16 bits, by `keep_db`, by `keep` or by a budget in paper bits (see `KeepOrder`). `search` is for method
    `gnn`, `importance` for `orthogonality`.
    `ends` is the format of the first and last layers, None: they are decided on like the others. With `streams`, each
    stream that a layer's input is a concatenation of is decided on by itself. With `smooth`, inputs
    of layers are smoothed first, and everything is about the smoothed weights. `reconstruct` has the rounding of uaq
    formats learned, however the recipe was decided. With `compensate`, codes are chosen by error feedback; None: with
    method `auto`, wherever the pipeline runs. `minutes` are for exchanges that are measured, after the default
    (or `adjoint`) has decided.
    """

    source: str
    out: Path | None
    budget: BudgetOrder
    method: str = "auto"
    formats: str = "wide"
    recipe: Recipe | None = None
    store: Path | None = None
    variant: str | None = None
    sampling: SamplingOrder = DEFAULT_SAMPLING
    compute: Compute = DEFAULT_COMPUTE
    link: bool = False
    check: bool = True
    probe_groups: bool = False
    overwrite: bool = False
    search: SearchOrder = DEFAULT_SEARCH
    importance: ImportanceOptions = DEFAULT_IMPORTANCE
    activations: ActivationOrder = DYNAMIC_ACTIVATIONS
    ends: str | None = None
    streams: bool = True
    smooth: SmoothOrder | None = None
    reconstruct: ReconstructionOptions | None = None
    keep_db: float | None = None
    keep: int | None = None
    minutes: float | None = None
    compensate: bool | None = None

    def __post_init__(self) -> None:
        """Checks method, formats, budget and output together.

        Raises:
            InputError: an unknown method or format, no budget where one is needed, or one beside a recipe.
        """
        if self.one_format is None and self.recipe is None and self.method not in METHODS:
            known = f"{', '.join(METHODS)}, {UNIFORM}FORMAT or {HYBRID}FORMAT"
            raise InputError(f"the method must be one of {known}, got {self.method!r}")
        asked = parse_formats(self.formats)
        if not self.is_given and self.one_format is None and not any(f.is_quantized for f in asked):
            raise InputError(f"the formats {self.formats} leave every layer as it is; add one such as kmc4")
        if self.ends is not None:
            Format.parse(self.ends)
        if self.recipe is not None and (self.budget.is_given or self.method != "auto" or self.ends is not None):
            raise InputError("a recipe decides everything: leave out --method, --ends and the budget")
        if self.compensate and self.reconstruct is not None:
            raise InputError("--compensate and --reconstruct both choose the codes: give one of them")
        self._check_minutes()
        self._check_budget() if self.hybrid_format is None else self._check_keeping(self.hybrid_format)

    def _check_minutes(self) -> None:
        if self.minutes is None:
            return
        if not 0 < self.minutes < math.inf:
            raise InputError(f"--minutes is a positive number of minutes, got {self.minutes:g}")
        if self.recipe is not None or self.method not in ("auto", "adjoint"):
            raise InputError(
                f"--minutes are for exchanges after the default method, or adjoint; got {self.method!r}. Leave it out, "
                "or search by measured recipes with sedimo run"
            )

    def _check_budget(self) -> None:
        if self.keep_db is not None or self.keep is not None:
            raise InputError(f"--keep-db and --keep are for hybrid precision: --method {HYBRID}uaq4")
        if not self.is_given and not self.budget.is_given:
            raise InputError("a budget is needed: --bits 3.5 (or --stored-bits, --bytes), --bops 12.5%, or both")
        if self.method == "gnn" and not self.budget.has_size:
            raise InputError(
                "a search draws recipes around a size: give --bits (or --stored-bits, --bytes) with --bops"
            )

    def _check_keeping(self, number_format: Format) -> None:
        if (self.budget.is_given and self.budget.bits is None) or self.budget.bops is not None:
            raise InputError(f"{self.method!r} knows budgets in paper bits alone: --bits 5; got {self.budget}")
        if not number_format.is_quantized:
            raise InputError(f"hybrid precision needs a format that changes weights, got {number_format}")
        if not self.keeping.is_given:
            raise InputError(f"{self.method!r} needs a rule which blocks stay at 16 bits: --keep-db, --keep or --bits")

    @property
    def is_given(self) -> bool:
        """Whether the recipe is given and nothing has to be found out."""
        return self.recipe is not None or self.method.startswith(UNIFORM)

    @property
    def hybrid_format(self) -> Format | None:
        """The format of `hybrid:FORMAT`."""
        return self.one_format if self.recipe is None and self.method.startswith(HYBRID) else None

    @property
    def keeping(self) -> KeepOrder:
        """By which rule blocks stay at 16 bits, for `hybrid:FORMAT`."""
        return KeepOrder(self.keep_db, self.keep, self.budget.bits)

    @property
    def measured_method(self) -> str:
        """The method by which costs are found out."""
        return self.method.removesuffix(BY_LP)

    @property
    def rule(self) -> str:
        """The rule by which formats are chosen from the costs: exact, or the published linear programme."""
        return "lp" if self.method.endswith(BY_LP) else "milp"

    @property
    def one_format(self) -> Format | None:
        """The format of `uniform:FORMAT` or `hybrid:FORMAT`.

        Raises:
            InputError: there is no such format.
        """
        prefix = next((p for p in (UNIFORM, HYBRID) if self.method.startswith(p)), None)
        return None if prefix is None else Format.parse(self.method.removeprefix(prefix))

    @property
    def study_folder(self) -> Path | None:
        """Where measurements are kept, so that an interrupted run goes on."""
        if self.store is not None:
            return self.store
        return None if self.out is None else self.out.absolute().with_name(self.out.resolve().name + ".study")

    def check_places(self, source: Path) -> None:
        """Refuses outputs that could not be written, before anything is measured.

        Raises:
            InputError: no output, one that exists, or one that lies in the source or in the study, or around it.
        """
        if self.out is None or self.study_folder is None:
            raise InputError("an output folder is needed: -o OUT")
        if self.out.resolve() == Path.cwd():
            raise InputError("the output cannot be the working folder, which it would replace: name a folder with -o")
        is_used = self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir()))
        if is_used and not self.overwrite:
            raise InputError(f"{self.out} exists already and is not an empty folder; choose another or remove it")
        places = {"the source": source, "the output": self.out, "the study": self.study_folder}
        resolved = {name: path.resolve() for name, path in places.items()}
        for name, path in resolved.items():
            inside = [other for other, outer in resolved.items() if other != name and path.is_relative_to(outer)]
            if inside:
                raise InputError(f"{name} {places[name]} must not lie in {inside[0]} {places[inside[0]]}")


def refuse_blind(method: str, formats: Iterable[Format], importance: ImportanceOptions = DEFAULT_IMPORTANCE) -> None:
    """Refuses several widths of activations for a method that sees weights alone, before anything is measured.

    Raises:
        InputError: naming the method.
    """
    widths = sorted({f.activation_bits for f in formats})
    is_blind = method.startswith("error") or (method.startswith("orthogonality") and importance.objective != "bits")
    if len(widths) > 1 and is_blind:
        raise InputError(
            f"method {method!r} sees weights alone and cannot choose among activations of {widths} bits: use another "
            "method (orthogonality: with --importance-of bits), or one width with --act"
        )
