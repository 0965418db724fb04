"""What a person orders when random recipes are to be measured, checked before anything long starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sedimo.api.order import (
    DEFAULT_COMPUTE,
    DEFAULT_SAMPLING,
    DYNAMIC_ACTIVATIONS,
    ActivationOrder,
    Compute,
    SamplingOrder,
    refuse_blind,
)
from sedimo.api.search_order import check_study
from sedimo.api.smooth_order import SmoothOrder
from sedimo.errors import InputError
from sedimo.measurement.exploration import SAMPLERS, Exploration, SamplerName, possible_bits
from sedimo.measurement.objective import MIN_IMAGES
from sedimo.measurement.trial import OBJECTIVES, ObjectiveName
from sedimo.quant.formats import parse_formats
from sedimo.space import SearchSpace

ExecutorName = Literal["serial", "process"]
EXECUTORS: tuple[ExecutorName, ...] = get_args(ExecutorName)
EXPLORATION, SOURCE, SPACE, GRAPH = "exploration", "source", "space", "graph"  # records of an explored study
THREADS_PER_WORKER = 4  # where no number of workers is ordered


@dataclass(frozen=True, slots=True)
class ExploreOrder:
    """Which random recipes of a source to measure, on what, where to keep them, and who does it.

    Recipe i is a function of (`study_seed`, i), of the formats and the sampler; the seeds of `sampling` are those of
    the samples. Every recipe is measured by each of the `objectives`. `workers` is for the executor `process`. The
    `prior` is measured first, for the predictors that are trained on the study. `ends` is the format of the first and
    last layers, None: they vary like the others. With `streams`, those of a layer's input vary by themselves. With
    `smooth`, all of it is about the smoothed weights; `activations` say how inputs are rounded.
    """

    source: str
    store: Path
    trials: int
    formats: str = "wide"
    sampler: SamplerName = "stratified"
    low_bits: float | None = None
    high_bits: float | None = None
    objectives: tuple[ObjectiveName, ...] = ("final_latents",)
    study_seed: int = 0
    sampling: SamplingOrder = DEFAULT_SAMPLING
    compute: Compute = DEFAULT_COMPUTE
    variant: str | None = None
    executor: ExecutorName = "serial"
    workers: int | None = None
    prior: str = "jacobian"
    ends: str | None = None
    streams: bool = True
    activations: ActivationOrder = DYNAMIC_ACTIVATIONS
    smooth: SmoothOrder | None = None

    def __post_init__(self) -> None:
        """Refuses what can be seen to be senseless before the source is opened.

        Raises:
            InputError: no trials, an unknown or repeated objective, too few seeds for `fid`, formats that quantize
                nothing, an unknown sampler or executor, no workers, or workers for `serial`.
        """
        if self.trials < 1:
            raise InputError(f"there must be at least one trial, got {self.trials}")
        self._check_objectives()
        formats = parse_formats(self.formats)
        if not any(f.is_quantized for f in formats):
            raise InputError(f"the formats {self.formats} leave every layer as it is; add one such as kmc4")
        refuse_blind(f"{self.prior} (the prior)", formats)
        if self.sampler not in SAMPLERS:
            raise InputError(f"the sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.executor not in EXECUTORS:
            raise InputError(f"the executor must be one of {', '.join(EXECUTORS)}, got {self.executor!r}")
        check_study(self.study_seed, self.prior)
        if self.workers is not None and self.executor != "process":
            raise InputError("a number of workers is for --executor process")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"there must be at least one worker, got {self.workers}")

    def _check_objectives(self) -> None:
        unknown = [name for name in self.objectives if name not in OBJECTIVES]
        if unknown or not self.objectives:
            raise InputError(f"objectives must be of {', '.join(OBJECTIVES)}, got {', '.join(unknown) or 'none'}")
        if len(set(self.objectives)) != len(self.objectives):
            raise InputError(f"each objective is measured once, got {', '.join(self.objectives)}")
        if "fid" in self.objectives and self.sampling.n_seeds < MIN_IMAGES:
            raise InputError(
                f"the objective 'fid' needs at least {MIN_IMAGES} samples, got {self.sampling.n_seeds}: "
                f"give --seeds {MIN_IMAGES} or more"
            )

    @property
    def format_texts(self) -> tuple[str, ...]:
        """The formats, sorted."""
        return tuple(sorted(str(f) for f in parse_formats(self.formats)))

    @property
    def n_copies(self) -> int:
        """Pipelines in memory at once; the driver of several workers has one of its own."""
        return 1 if self.executor == "serial" else self.n_workers + 1

    @property
    def n_workers(self) -> int:
        """Pipelines that measure at the same time."""
        if self.executor == "serial":
            return 1
        return min(self.trials, self.workers or max(2, (os.cpu_count() or 1) // THREADS_PER_WORKER))

    def exploration(self, space: SearchSpace) -> Exploration:
        """The recipes, in a space.

        Raises:
            InputError: a range of bits for the sampler `paper`, or one that the formats do not allow.
        """
        least, most = possible_bits(space)
        for name, bits in (("low", self.low_bits), ("high", self.high_bits)):
            if bits is not None and not least <= bits <= most:
                raise InputError(
                    f"the {name} end of the bits must be possible: these formats allow {least:.4f} to {most:.4f} "
                    f"paper bits per weight, got {bits:g}"
                )
        return Exploration(self.study_seed, space, self.sampler, self.low_bits, self.high_bits)
