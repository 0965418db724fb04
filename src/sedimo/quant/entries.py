"""What a recipe says of one layer: a format, or those of parts along its input channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sedimo.codec import from_plain
from sedimo.errors import InputError
from sedimo.quant.formats import FP16, Format


@dataclass(frozen=True, slots=True)
class PartFormat:
    """The format of the input channels `start` to `stop` (exclusive) of a layer."""

    start: int
    stop: int
    format: Format

    def __post_init__(self) -> None:
        """Refuses an empty range."""
        if not 0 <= self.start < self.stop:
            raise InputError(f"a part must be a range of input channels, got {self.start}..{self.stop}")


Entry = Format | tuple[PartFormat, ...]  # what a recipe says of a layer


def entry_text(entry: Entry) -> str:
    """An entry of a recipe for people, such as `kmc4` or `0..96 kmc4 | 96..160 uaq5`."""
    return str(entry) if isinstance(entry, Format) else " | ".join(f"{p.start}..{p.stop} {p.format}" for p in entry)


def covering(n_inputs: int, parts: Iterable[PartFormat]) -> Entry:
    """The entry of some parts of a layer of `n_inputs`: fp16 between them, and as a whole if all of them are."""
    found: list[PartFormat] = []
    for part in sorted(parts, key=lambda p: p.start):
        end = found[-1].stop if found else 0
        found += [*([PartFormat(end, part.start, FP16)] if part.start > end else []), part]
    if found[-1].stop < n_inputs:
        found.append(PartFormat(found[-1].stop, n_inputs, FP16))
    return FP16 if all(p.format == FP16 for p in found) else tuple(found)


def parts_of(entry: Entry, n_inputs: int) -> tuple[PartFormat, ...]:
    """The parts of an entry of a layer of `n_inputs`: one, if it is a format."""
    return (PartFormat(0, n_inputs, entry),) if isinstance(entry, Format) else entry


def read_entry(value: object) -> Entry:
    """An entry from a format, its text, or a list of `{start, stop, format}`.

    Raises:
        InputError: it is neither.
        StateError: a part that is not as it should be.
    """
    if isinstance(value, Format):
        return value
    if isinstance(value, str):
        return Format.parse(value)
    if isinstance(value, Sequence) and value:
        return tuple(p if isinstance(p, PartFormat) else from_plain(PartFormat, p, place="part") for p in value)
    raise InputError("a layer takes a format text or a list of parts {start, stop, format}")
