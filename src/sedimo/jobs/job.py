"""What a job is: everything about one thing that a command does, from settings to a result that can be shown.

A job lives in one file, which makes one constant of the class `Job`; `jobs.JOBS` lists them all. The command line and
the reference pages are made from that tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Generic, TypeVar

from sedimo import methods, treatments
from sedimo.codec import to_plain
from sedimo.methods.method import Method, Price
from sedimo.progress import Progress
from sedimo.reporting.page import Facts, Page, page_of
from sedimo.reporting.words import byte_size, duration
from sedimo.settings import build, leaves, read_words, settings_of
from sedimo.space import SearchSpace
from sedimo.treatments.treatment import Treatment

Offer = Method[Any] | Treatment[Any]
Settings = TypeVar("Settings")
Result = TypeVar("Result")


def as_json(result: Any) -> Any:
    """The plain values of a result: as it tells them itself, or its fields by name; scripts may rely on the names."""
    return result.as_json() if hasattr(result, "as_json") else to_plain(result)


def outlook(source: str, space: SearchSpace, price: Price) -> dict[str, Any]:
    """What a dry run tells of any job: what is decided on, and what the work takes."""
    return {
        "source": source,
        "n_decisions": len(space.decisions),
        "n_formats": len({f for d in space.decisions for f in d.formats}),
        "seconds": price.seconds,
        "denoiser_calls": price.n_calls,
        "memory_bytes": price.memory_bytes,
        "disk_bytes": price.disk_bytes,
    }


def outlook_page(
    found: Mapping[str, Any], headline: str, facts: Mapping[str, str], *, memory: str, workers: str = ""
) -> Page:
    """The same for people, below facts of the job's own; `memory` and `workers` say what the figures are of."""
    takes = {
        "time": f"about {duration(found['seconds'])}{workers}, {found['denoiser_calls']:,} denoiser calls",
        "memory": f"about {byte_size(found['memory_bytes'])}{memory}",
        "disk": f"about {byte_size(found['disk_bytes'])}",
    }
    decided = f"{found['n_decisions']} decisions, {found['n_formats']} formats{headline}"
    return page_of(found["source"], decided, Facts((*facts.items(), *takes.items())))


@dataclass(frozen=True)
class Job(Generic[Settings, Result]):
    """One thing that a command does.

    `run` does it; `page` and `as_json` tell what came of it, to people and to programs. With `plan`, a dry run tells
    what it takes, by `plan_page` and `as_json`. `words` is what help says: the module's docstring. `offers` are
    methods and treatments, whose knobs are further options; what is set of them goes into the settings' `chosen`.
    """

    words: str
    settings: type[Settings]
    run: Callable[[Settings, Progress], Result]
    page: Callable[[Result], Page]
    as_json: Callable[[Any], object] = as_json
    plan: Callable[[Settings, Progress], object] | None = None
    plan_page: Callable[[Any], Page] = lambda _plan: Page("")
    offers: Callable[[], Sequence[Offer]] = tuple

    def read(self, words: Mapping[str, object], command: str = "") -> Settings:
        """The settings from keywords, methods and treatments included; `command` is what was typed, for records.

        What several methods and treatments take is set of all of them; an unknown keyword is an InputError.
        """
        own, offers = {leaf.word for leaf in leaves(self.settings)}, self.offers()
        given = {
            one.name: {leaf.word: words[leaf.word] for leaf in leaves(one.knobs) if leaf.word in words.keys() - own}
            for one in offers
        }
        chosen = {o.name: build(o.knobs, read_words(o.knobs, given[o.name])) for o in offers if given[o.name]}
        left = {word: value for word, value in words.items() if not any(word in found for found in given.values())}
        return build(self.settings, {("command",): command, ("chosen",): chosen, **read_words(self.settings, left)})

    @property
    def offered(self) -> Mapping[str, list[str]]:
        """Methods as people write them, and treatments, which are few: the first option of each stands in the help."""
        offers = self.offers()
        return {
            "methods": [str(one) for one in offers if isinstance(one, Method)],
            "treatments": [one.name for one in offers if isinstance(one, Treatment)],
        }


def simple_job(
    words: str,
    function: Callable[..., Result],
    page: Callable[[Result], Page],
    as_json: Callable[[Result], object] = as_json,
) -> Job[Any, Result]:
    """A quick job, whose settings are what its function takes; to one that takes `progress` it is passed."""
    takes_progress = "progress" in signature(function).parameters

    def run(settings: object, progress: Progress) -> Result:
        return function(**vars(settings), **({"progress": progress} if takes_progress else {}))

    return Job(words, settings_of(function), run, page, as_json)


def all_offers() -> Sequence[Offer]:
    """All treatments and methods, some of which have nothing to set."""
    names = [one.name for one in treatments.TREATMENTS]  # which come first
    return (*treatments.TREATMENTS, *(one for one in methods.METHODS if one.name not in names))


def treatment_offers(*, is_early: bool = False) -> Sequence[Offer]:
    """All treatments, or those before the decision."""
    return [one for one in treatments.TREATMENTS if one.apply is not None or not is_early]


early_treatment_offers = partial(treatment_offers, is_early=True)
