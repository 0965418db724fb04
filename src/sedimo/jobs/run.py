"""From SRC to checkpoint and report: measure recipes, learn what matters, build, explain.

Example: sedimo run zoo:cifar-dit --bits 3.5 --trials 300 --refine 3 -o small
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from sedimo.allocation.budget import NO_BUDGET, BudgetSettings
from sedimo.jobs import quantize
from sedimo.jobs.job import Job, treatment_offers
from sedimo.jobs.quantize import QuantizeSettings
from sedimo.jobs.settings import FORMATS, SAMPLING, FormatSettings
from sedimo.lab.bench import SourceSettings
from sedimo.lab.seeds import SamplingSettings
from sedimo.methods.search import SEARCH, SearchSettings
from sedimo.settings import REQUIRED, block, option


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The main job by measured recipes, with the search's own settings in sight."""

    source: SourceSettings = block(REQUIRED, "Source")
    budget: BudgetSettings = block(NO_BUDGET, "Budget")
    out: Path | None = option(None, "-o", "--out", help="Folder to write.")
    search: SearchSettings = block(SearchSettings(), "Search")
    formats: FormatSettings = block(FORMATS, "Formats")
    sampling: SamplingSettings = block(SAMPLING, "Sampling")
    store: Path | None = option(None, "--store", help="Folder for measurements; default: OUT.study beside OUT.")
    link: bool = option(False, "--link", help="Hard-link the other components instead of copying them.")
    check: bool = option(True, no="--no-check", help="Skip the sampled comparison and what else explains the result.")
    chosen: Mapping[str, object] = field(default_factory=dict)
    command: str = ""

    @property
    def job(self) -> QuantizeSettings:
        """The same as settings of the main job."""
        shared = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "search"}
        return QuantizeSettings(
            **{**shared, "method": SEARCH.name, "chosen": {**self.chosen, SEARCH.name: self.search}}
        )


JOB = Job(
    __doc__,
    RunSettings,
    lambda settings, progress: quantize.run(settings.job, progress),
    quantize.page,
    plan=lambda settings, progress: quantize.plan(settings.job, progress),
    plan_page=quantize.plan_page,
    offers=treatment_offers,
)
