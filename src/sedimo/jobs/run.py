"""From SRC to checkpoint and report: measure recipes, learn what matters, build, explain.

Example: sedimo run zoo:cifar-dit --bits 3.5 --trials 300 --refine 3 -o small
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from sedimo.jobs import quantize
from sedimo.jobs.job import Job, treatment_offers
from sedimo.jobs.quantize import QuantizeSettings
from sedimo.methods.search import SEARCH, SearchSettings
from sedimo.settings import block
from sedimo.targets.diffusers import DIFFUSERS


@dataclass(frozen=True, slots=True)
class RunSettings(QuantizeSettings):
    """The main job by measured recipes: the search's own settings in sight, and nothing else to choose."""

    method: str = SEARCH.name
    recipe: None = None
    target: str = DIFFUSERS.name
    search: SearchSettings = block(SearchSettings(), "Search")

    @property
    def job(self) -> QuantizeSettings:
        """The same as settings of the main job."""
        shared = {one.name: getattr(self, one.name) for one in fields(QuantizeSettings)}
        return QuantizeSettings(**{**shared, "chosen": {**self.chosen, SEARCH.name: self.search}})


JOB = Job(
    __doc__,
    RunSettings,
    lambda settings, progress: quantize.run(settings.job, progress),
    quantize.page,
    plan=lambda settings, progress: quantize.plan(settings.job, progress),
    plan_page=quantize.plan_page,
    offers=treatment_offers,
)
