"""Block curves of a source as a command of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sedimo.api.hybrid import BlocksResult, measure_hybrid
from sedimo.api.keep_order import KeepOrder
from sedimo.api.measuring import make_bank
from sedimo.api.opening import open_pipeline
from sedimo.api.order import (
    DEFAULT_COMPUTE,
    DEFAULT_SAMPLING,
    DYNAMIC_ACTIVATIONS,
    ActivationOrder,
    BudgetOrder,
    Compute,
    SamplingOrder,
)
from sedimo.api.smooth_order import SmoothOrder
from sedimo.api.smoothing import smooth_source
from sedimo.bank import SILENT, Progress
from sedimo.errors import InputError
from sedimo.measurement.study import Study
from sedimo.measurement.trial import ObjectiveName
from sedimo.quant.formats import Format


@dataclass(frozen=True, slots=True)
class BlocksOrder:
    """What to measure block by block, and by which one rule blocks stay at 16 bits; without a rule none do.

    `keep_db` keeps those whose protection gains so much [dB], `keep` so many, `bits` as many as the average paper bits
    allow. With `smooth`, all of it is about the smoothed weights; `activations` say how inputs are rounded.
    """

    source: str
    store: Path
    number_format: Format
    objective: ObjectiveName = "final_latents"
    keep_db: float | None = None
    keep: int | None = None
    bits: float | None = None
    variant: str | None = None
    sampling: SamplingOrder = DEFAULT_SAMPLING
    compute: Compute = DEFAULT_COMPUTE
    activations: ActivationOrder = DYNAMIC_ACTIVATIONS
    smooth: SmoothOrder | None = None

    def __post_init__(self) -> None:
        """Refuses a format that changes no weight, an objective without curves, several rules, and no numbers."""
        if not self.number_format.is_quantized:
            raise InputError(f"block curves need a format that changes weights, got {self.number_format}")
        if self.objective not in ("final_latents", "path", "step"):
            raise InputError(f"block curves are measured by final_latents, path or step, got {self.objective!r}")
        BudgetOrder(bits=self.bits)
        _ = self.keeping  # refuses several rules

    @property
    def keeping(self) -> KeepOrder:
        """By which rule blocks stay at 16 bits."""
        return KeepOrder(self.keep_db, self.keep, self.bits)


def measure_blocks(order: BlocksOrder, progress: Progress = SILENT) -> BlocksResult:
    """Both curves of a format, and the hybrid recipe of the order's rule. Resumes in the study.

    Raises:
        InputError: the source cannot be sampled, no layer can take the format, or a budget below all quantized.
        Interrupted: Ctrl-C; what was measured is kept.
    """
    opened = open_pipeline(order, f"{order.number_format},fp16", streams=False)  # nothing is decided on single layers
    with Study(order.store) as study:
        smooth_source(opened, study, progress)
        bank = make_bank(opened, study, is_exact=True, progress=progress)
        how = (order.number_format, order.keeping)
        return measure_hybrid(opened, bank, study, *how, objective=order.objective, progress=progress)
