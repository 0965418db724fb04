"""Blocks of settings that several jobs share, and how a lab is opened from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sedimo import treatments
from sedimo.errors import InputError
from sedimo.lab.bench import SourceSettings
from sedimo.lab.lab import Lab
from sedimo.lab.seeds import SamplingSettings
from sedimo.progress import Progress
from sedimo.quant.formats import Format, parse_formats, with_activations
from sedimo.settings import Checked, leaves, option, read_by, within
from sedimo.space import search_space
from sedimo.treatments.treatment import Treatment

SAMPLING = SamplingSettings()


def parts_of(text: str) -> tuple[str, ...]:
    """The parts of a text that commas separate; empty ones are left out."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


COMPARABLE = within(least=2, hint="seeds to compare on")


@dataclass(frozen=True, slots=True)
class FormatSettings(Checked):
    """Which formats there are to choose from.

    `ends` is the format of the first and last layers, None: they are decided on like the others. Unless `whole_layers`,
    each stream that a layer's input is a concatenation of is decided on by itself.
    """

    formats: str = option("wide", "--formats", metavar="LIST", help="wide, paper, or a list such as kmc4,uaq4g64,fp16.")
    act: str | None = option(
        None, "--act", metavar="LIST", help="Widths of activations, such as a8 or a4,a6,a8; default: a16."
    )
    ends: str | None = option(
        None,
        "--ends",
        check=read_by(Format.parse),
        metavar="FORMAT",
        help="Of the first and last layers, such as uaq8.",
    )
    whole_layers: bool = option(
        False, "--whole-layers", help="One decision per layer, also where its input is a concatenation (U-Net skips)."
    )

    def check_together(self) -> None:
        """Reads all of it once, so that nothing long starts with a text that says nothing."""
        _ = self.choices

    @property
    def choices(self) -> tuple[Format, ...]:
        """The formats, each with each width of activations that was asked for."""
        found = parse_formats(self.formats)
        if self.act is None:
            return found
        widths = [part.removeprefix("a") for part in parts_of(self.act)]
        if not widths or not all(width.isdecimal() for width in widths):
            raise InputError(f"widths of activations are written such as a8 or a4,a6,a8; got {self.act!r}")
        return tuple(with_activations(found, map(int, widths)))

    @property
    def text(self) -> str:
        """The formats as one text; a name such as `wide` stays a name."""
        return self.formats if self.act is None else ",".join(map(str, self.choices))

    def refuse_nothing(self) -> None:
        """Refuses formats that leave every layer as it is."""
        if not any(f.is_quantized for f in self.choices):
            raise InputError(f"the formats {self.text} leave every layer as it is; add one such as kmc4")


FORMATS = FormatSettings()


def one_format(number_format: Format) -> FormatSettings:
    """A format or none, of whole layers: nothing is decided on single ones."""
    return FormatSettings(f"{number_format},fp16", whole_layers=True)


def open_lab(
    source: SourceSettings,
    formats: FormatSettings,
    *,
    chosen: Mapping[str, object],
    sampling: SamplingSettings = SAMPLING,
    progress: Progress,
    streams: Collection[str] | None = None,
) -> Lab:
    """A lab on a source, for formats as they are set; with `streams`, those layers are decided on by streams."""
    ends = [] if formats.ends is None else [Format.parse(formats.ends)]
    for treatment, knobs in treatments_of(chosen):
        treatment.refuse(knobs, [*formats.choices, *ends])
    decided = not formats.whole_layers if streams is None else streams
    lab = Lab(source, sampling=sampling, progress=progress)
    return lab.decided_on(search_space(lab.graph, formats.text, ends=formats.ends, streams=decided), ends=formats.ends)


def treatments_of(chosen: Mapping[str, object]) -> list[tuple[Treatment[Any], object]]:
    """The treatments that are wanted, with what was set of them."""
    return [
        (one, chosen[one.name])
        for one in treatments.TREATMENTS
        if one.name in chosen and one.is_wanted(chosen[one.name])
    ]


def refuse_together(chosen: Mapping[str, object]) -> None:
    """Refuses treatments that cannot be together."""
    wanted = [one for one, _ in treatments_of(chosen)]
    for one in wanted:
        if not {other.name for other in wanted}.isdisjoint(one.excludes):
            names = (one.name, next(other.name for other in wanted if other.name in one.excludes))
            flags = [next(leaves(t.knobs)).flags[0] for t in treatments.TREATMENTS if t.name in names]
            raise InputError(f"{flags[0]} and {flags[1]} both choose the codes: give one of them")


def treated(lab: Lab, chosen: Mapping[str, object]) -> Lab:
    """The lab under all treatments that come before the decision, one after another, each measured on what is there."""
    for treatment, knobs in treatments_of(chosen):
        applied = None if treatment.apply is None else treatment.apply(lab, knobs)
        lab = lab if applied is None else lab.treated(applied)
    return lab
