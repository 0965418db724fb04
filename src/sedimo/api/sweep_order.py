"""What is swept, over which values, and how it is measured. Checked before anything long starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

from sedimo.api.order import (
    DEFAULT_COMPUTE,
    DEFAULT_SAMPLING,
    DYNAMIC_ACTIVATIONS,
    ActivationOrder,
    BudgetOrder,
    Compute,
    Order,
    SamplingOrder,
)
from sedimo.api.smooth_order import DEFAULT_SHARE, SmoothOrder
from sedimo.errors import InputError
from sedimo.measurement.calibration import CalibrationOptions
from sedimo.pipelines.schedulers import SCHEDULERS
from sedimo.quant.formats import FULL_BITS, Format

Question = Literal["alpha", "calibration", "threshold", "samples", "schedulers"]
QUESTIONS: tuple[Question, ...] = get_args(Question)
Signal = Literal["jacobian", "sqnr"]
FORMATS: Mapping[Question, str] = {
    "alpha": "uaq8a8",
    "calibration": "uaq8a8",
    "threshold": "uaq4",
    "samples": "uaq4",
    "schedulers": "uaq4",
}
MOST_SAMPLES = 1024
_ROUNDS_INPUTS = ("alpha", "calibration")
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
_VALUES: Mapping[Question, tuple[str, ...]] = {
    "alpha": ("0.5", "0.6", "0.7", "0.8", "0.9"),
    "samples": ("8", "16", "32", "64", "128"),
    "schedulers": SCHEDULERS,
}


@dataclass(frozen=True)
class SweepOrder:
    """One question about one format. Without `values`, the usual ones; `number_format` None: the question's usual one.

    `share` of the layers is smoothed for `alpha`. `activations` say how inputs are rounded; `calibration` replaces the
    number of steps there. `signal` is what `schedulers` compares. Values are measured on the fresh seeds of `sampling`,
    so many as its `n_check_seeds`; ranges are calibrated on `activations.n_samples` others.
    """

    question: Question
    source: str
    store: Path
    values: tuple[str, ...] = ()
    number_format: Format | None = None
    activations: ActivationOrder = DYNAMIC_ACTIVATIONS
    share: float = DEFAULT_SHARE
    signal: Signal = "jacobian"
    variant: str | None = None
    sampling: SamplingOrder = DEFAULT_SAMPLING
    compute: Compute = DEFAULT_COMPUTE

    def __post_init__(self) -> None:
        """Refuses an unknown question, values that it does not have, and a format that it says nothing about."""
        if self.question not in QUESTIONS:
            raise InputError(f"the question must be one of {', '.join(QUESTIONS)}, got {self.question!r}")
        if self.signal not in get_args(Signal):
            raise InputError(f"schedulers are compared by {', '.join(get_args(Signal))}, got {self.signal!r}")
        if not self.format.is_quantized:
            raise InputError(f"a sweep needs a format that changes weights, got {self.format}")
        if self.question in _ROUNDS_INPUTS and self.format.activation_bits == FULL_BITS:
            raise InputError(f"{self.question} is about rounded activations: give a format with their bits, as uaq8a8")
        if self.sampling.n_check_seeds < 2:
            raise InputError(f"a sweep needs at least two fresh seeds, got {self.sampling.n_check_seeds}")
        self._check_values()

    def _check_values(self) -> None:
        if self.question == "schedulers":
            _check_names(self.texts)
        elif self.question == "samples":
            _check_samples(self.counts)
        elif self.question == "calibration":
            _check_steps(self.counts, self.sampling.n_steps)
        elif self.question == "alpha":
            _check_alphas(self.smoothing)
        elif any(count < 0 for count in self.counts):
            raise InputError(f"so many blocks cannot stay at 16 bits: {min(self.counts)}")

    @property
    def format(self) -> Format:
        """The format that the question is asked about."""
        return self.number_format or Format.parse(FORMATS[self.question])

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The values as text, each once; empty for all numbers of blocks."""
        if self.question == "calibration" and not self.values:
            n_steps = self.sampling.n_steps
            return (*(str(n) for n in _STEPS if n < n_steps), str(n_steps))
        return tuple(dict.fromkeys(self.values or _VALUES.get(self.question, ())))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The values as whole numbers, ascending.

        Raises:
            InputError: one that is none.
        """
        try:
            return tuple(sorted({int(text) for text in self.texts}))
        except ValueError as error:
            raise InputError(f"values of {self.question} are whole numbers, got {', '.join(self.texts)}") from error

    @cached_property
    def smoothing(self) -> tuple[SmoothOrder, ...]:
        """How to smooth at each alpha, ascending; 0 is the baseline and left out.

        Raises:
            InputError: an alpha that is none.
        """
        try:
            alphas = sorted({float(text) for text in self.texts} - {0.0})
        except ValueError as error:
            raise InputError(f"values of alpha are numbers such as 0.7, got {', '.join(self.texts)}") from error
        return tuple(SmoothOrder(alpha, self.share) for alpha in alphas)

    def calibrated(self, n_steps: int) -> ActivationOrder:
        """Static ranges from so many steps, by the method that is ordered, or by least and greatest values."""
        wanted = self.activations
        options = wanted.calibration or CalibrationOptions(symmetric=wanted.symmetric)
        return replace(wanted, calibration=replace(options, n_steps=n_steps))

    @property
    def job(self) -> Order:
        """The main job's order of the format everywhere; nothing of it is written."""
        return Order(
            self.source,
            None,
            BudgetOrder(),
            method=f"uniform:{self.format}",
            variant=self.variant,
            sampling=self.sampling,
            compute=self.compute,
            check=False,
            activations=self.activations,
        )


def _check_names(names: tuple[str, ...]) -> None:
    unknown = [name for name in names if name not in SCHEDULERS]
    if unknown or len(names) < 2:
        raise InputError(f"two or more of the schedulers {', '.join(SCHEDULERS)} are compared, got {', '.join(names)}")


def _check_samples(counts: tuple[int, ...]) -> None:
    if len(counts) < 2 or counts[0] < 2 or counts[-1] > MOST_SAMPLES:
        raise InputError(f"two or more numbers of samples from 2 to {MOST_SAMPLES} are compared, got {_listed(counts)}")
    if any(more < 2 * fewer for fewer, more in pairwise(counts)):
        raise InputError(
            f"each number of samples must be at least twice the one before, so that none shares samples with another; "
            f"got {_listed(counts)}"
        )


def _check_steps(counts: tuple[int, ...], n_steps: int) -> None:
    if counts[0] < 1 or counts[-1] > n_steps:
        raise InputError(f"ranges are calibrated at 1 to {n_steps} steps (--steps), got {_listed(counts)}")


def _check_alphas(orders: tuple[SmoothOrder, ...]) -> None:
    if not orders:
        raise InputError("a sweep of alpha needs a value above 0, which is the baseline: --values 0.5,0.7,0.9")


def _listed(counts: tuple[int, ...]) -> str:
    return ", ".join(map(str, counts))
