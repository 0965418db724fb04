"""Which blocks of SRC noise enters through: the first N quantized, all but one; and a hybrid recipe.

Example: sedimo blocks zoo:cifar-dit --format uaq4 --store runs/blocks --keep 1 -o hybrid.json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sedimo.allocation.budget import BudgetSettings
from sedimo.errors import InputError
from sedimo.jobs.job import Job, early_treatment_offers
from sedimo.jobs.settings import SAMPLING, one_format, open_lab, treated
from sedimo.lab.bench import SourceSettings
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import ObjectiveName, Study
from sedimo.methods.hybrid import BlockCurves, KeepSettings, hybrid_recipe, measure_hybrid
from sedimo.pipelines.folder import write_file
from sedimo.progress import SILENT, Progress
from sedimo.quant.formats import Format
from sedimo.reporting.html import write_page
from sedimo.reporting.measured_maps import blocks_page
from sedimo.settings import REQUIRED, Checked, block, one_of, option
from sedimo.space import Recipe

WITHOUT_IMAGES = ("final_latents", "path", "step")


@dataclass(frozen=True, slots=True)
class BlocksSettings(Checked):
    """What to measure block by block, and by which one rule blocks stay at 16 bits; without a rule none do."""

    source: SourceSettings = block(REQUIRED, "Source")
    number_format: Format = option(
        REQUIRED, "--format", parse=Format.parse, help="The format of quantized blocks, such as uaq4."
    )
    store: Path = option(REQUIRED, "--store", help="Folder of the study.")
    objective: ObjectiveName = option(
        "final_latents", "--objective", check=one_of(WITHOUT_IMAGES), help="final_latents, path or step."
    )
    keeping: KeepSettings = block(KeepSettings(), "Blocks at 16 bits")
    bits: float | None = option(
        None, "--bits", help="Keep as many blocks at 16 bits as so many paper bits per weight allow."
    )
    out: Path | None = option(None, "-o", "--out", help="File for the recipe.")
    page: Path | None = option(None, "--page", help="File for a page with both curves.")
    sampling: SamplingSettings = block(SAMPLING, "Sampling")
    chosen: Mapping[str, object] = field(default_factory=dict)

    def check_together(self) -> None:
        """Refuses a format that changes nothing, a size that no weight has, and several rules."""
        if not self.number_format.is_quantized:
            raise InputError(f"block curves need a format that changes weights, got {self.number_format}")
        BudgetSettings(bits=self.bits)
        _ = self.rule

    @property
    def rule(self) -> KeepSettings:
        """By which rule blocks stay at 16 bits."""
        return KeepSettings(self.keeping.keep_db, self.keeping.keep, self.bits)


def measure_blocks(settings: BlocksSettings, progress: Progress = SILENT) -> tuple[BlockCurves, Recipe]:
    """Both curves of a format, and the hybrid recipe of the rule, written where there is a place for them. Resumes."""
    lab = open_lab(
        settings.source,
        one_format(settings.number_format),
        chosen=settings.chosen,
        sampling=settings.sampling,
        progress=progress,
    )
    with Study(settings.store) as study:
        lab = treated(lab.kept_in(study), settings.chosen)
        curves = measure_hybrid(lab, settings.number_format, settings.rule, objective=settings.objective)
        recipe = hybrid_recipe(lab.bank.space, settings.number_format, curves.kept)
    if settings.out is not None:
        write_file(settings.out, recipe.to_json().encode())
    if settings.page is not None:
        write_page(blocks_page(curves), settings.page)
    return curves, recipe


def as_json(found: tuple[BlockCurves, Recipe]) -> Mapping[str, object]:
    """Plain values by name."""
    curves, recipe = found
    return {**curves.as_json(), "recipe": {name: str(entry) for name, entry in recipe.layers.items()}}


JOB = Job(
    __doc__, BlocksSettings, measure_blocks, lambda found: blocks_page(found[0]), as_json, offers=early_treatment_offers
)
