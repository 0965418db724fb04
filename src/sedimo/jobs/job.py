"""What a job is: everything about one thing that a command does, from settings to a result that can be shown.

A job lives in one file, which makes one constant of the class `Job`; `jobs.JOBS` lists them all. The command line and
the reference pages are made from that tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from sedimo import methods, treatments
from sedimo.bank import Progress
from sedimo.codec import to_plain
from sedimo.methods.method import Price
from sedimo.reporting.page import Facts, Page, page_of
from sedimo.reporting.words import byte_size, duration
from sedimo.settings import build, leaves, read_words, settings_of
from sedimo.space import SearchSpace

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
    records of further options by who owns them (methods, treatments), which go into the settings' field `chosen`.
    """

    words: str
    settings: type[Settings]
    run: Callable[[Settings, Progress], Result]
    page: Callable[[Result], Page]
    as_json: Callable[[Any], object] = as_json
    plan: Callable[[Settings, Progress], object] | None = None
    plan_page: Callable[[Any], Page] = lambda _plan: Page("")
    offers: Callable[[], Mapping[str, type]] = dict

    def read(self, words: Mapping[str, object], command: str = "") -> Settings:
        """The settings from keywords, and the command as it was typed, for the record.

        What several methods and treatments take is set of all of them.

        Raises:
            InputError: a word that there is not, or a value that the settings refuse.
        """
        own, offers = {leaf.word for leaf in leaves(self.settings)}, self.offers()
        found = {
            owner: {leaf.word: words[leaf.word] for leaf in leaves(record) if leaf.word in words.keys() - own}
            for owner, record in offers.items()
        }
        chosen: dict[str, object] = {
            o: build(offers[o], read_words(offers[o], given)) for o, given in found.items() if given
        }
        left = {word: value for word, value in words.items() if not any(word in given for given in found.values())}
        return build(self.settings, {("command",): command, ("chosen",): chosen, **read_words(self.settings, left)})

    @property
    def shown(self) -> frozenset[str]:
        """Owners whose first option stands in the help itself: treatments, which are few."""
        return frozenset(one.name for one in treatments.TREATMENTS)


def simple_job(
    words: str,
    function: Callable[..., Result],
    page: Callable[[Result], Page],
    as_json: Callable[[Result], object] = as_json,
) -> Job[Any, Result]:
    """A quick job, whose settings are what its function takes."""
    settings = settings_of(function)
    names = [one.name for one in fields(settings)]
    return Job(words, settings, lambda s, _: function(**{name: getattr(s, name) for name in names}), page, as_json)


def all_offers() -> Mapping[str, type]:
    """What people may set for treatments and for single methods, some of which have nothing to set."""
    found = treatment_offers()
    return {**found, **{one.name: one.knobs for one in methods.METHODS if one.name not in found}}


def treatment_offers() -> Mapping[str, type]:
    """What people may set for treatments."""
    return {one.name: one.knobs for one in treatments.TREATMENTS}


def early_treatment_offers() -> Mapping[str, type]:
    """What people may set for treatments before the decision."""
    return {one.name: one.knobs for one in treatments.TREATMENTS if one.apply is not None}


def offered_names(offers: Collection[str]) -> list[tuple[str, str]]:
    """The methods and treatments that are offered, as people write them, for help."""
    found = {
        "methods": ", ".join(str(one) for one in methods.METHODS if one.name in offers),
        "treatments": ", ".join(one.name for one in treatments.TREATMENTS if one.name in offers),
    }
    return [(kind, names) for kind, names in found.items() if names]


def described(name: str) -> list[tuple[str, str]]:
    """What a method or treatment does, what it sees and misses, and its source, for help."""
    of_methods = {one.name: one.words for one in methods.METHODS}
    words = (of_methods | {one.name: one.words for one in treatments.TREATMENTS})[name]
    found = {"about": words.summary, "sees": words.sees, "misses": words.misses, "source": words.source}
    return [(what, text) for what, text in found.items() if text]
