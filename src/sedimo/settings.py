"""Settings: frozen records whose fields say how people set them, on the command line and in Python.

A field is written once, with its default, its flag, its help, and what it refuses. From these the command line is made,
and the keywords of the public functions. Records may hold other records; what people see is flat.

    @dataclass(frozen=True, slots=True)
    class Settings(Checked):
        trials: int = option(REQUIRED, "--trials", check=within(least=1), help="...")
        sampler: str = option("paper", "--sampler", check=one_of(SAMPLERS), help="...")

        def check_together(self) -> None: ...  # only for what fields say together, and fields that are no option

An error names a value as people write it: `--trials must be at least 1, got 0` on the command line, and `trials` alone
in Python.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from sedimo.errors import InputError

Record = TypeVar("Record")
_KEY = "sedimo option"
_PANEL = "sedimo panel"
REQUIRED: Any = dataclasses.MISSING
Check = Callable[[Any, str], object]  # refuses a value by an InputError; the text is how people name the value


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that a person may set: its flags (none: a positional argument), and what people read about it.

    `parse` reads the text that a person writes; `choices` are the values that there are, found from a `Literal`
    if it is empty. What is not among them, below `least` or above `most` is no valid command line; a record that is
    `Checked` refuses it, too, and what `check` refuses. `no` is the flag that says no, for a yes or no whose default is
    None, or yes. `bare` is the value of a flag that is given without one. `place` tells that a text is the path of an
    existing file or folder.

    `leaves` knows the rest: the fields that lead to it, its type, its default, and under which heading it stands.
    """

    flags: tuple[str, ...]
    help: str | Callable[[], str]
    metavar: str | None = None
    parse: Callable[[str], object] | None = None
    choices: tuple[str, ...] = ()
    least: float = -math.inf
    most: float = math.inf
    check: Check | None = None
    no: str = ""
    bare: str | None = None
    place: Literal["", "file", "folder"] = ""
    path: tuple[str, ...] = ()
    kind: object = None
    default: object = None
    panel: str = ""

    @property
    def words(self) -> str:
        """The help as it is now: what it lists may have grown."""
        return self.help if isinstance(self.help, str) else self.help()

    @property
    def word(self) -> str:
        """The keyword in Python: the first long flag in snake case, else the field's name."""
        flag = next((f for f in self.flags if f.startswith("--")), self.path[-1])
        return flag.removeprefix("--").replace("-", "_")

    def refuse(self, value: Any, name: str) -> None:
        """Refuses a value by an InputError about `name`; not None and the default."""
        if value is None or value == self.default:
            return
        if self.choices:
            one_of(self.choices)(value, name)
        if math.isfinite(self.least) or math.isfinite(self.most):
            within(least=self.least, most=self.most)(value, name)
        if self.check is not None:
            self.check(value, name)


def option(default: Any, *flags: str, help: str | Callable[[], str], **more: Any) -> Any:  # click's and argparse's word
    """A field of a settings record with its default (`REQUIRED`: none) and its `Option`."""
    return field(default=default, metadata={_KEY: Option(flags, help, **more)})


def within(*, least: float = -math.inf, most: float = math.inf, above: float = -math.inf, hint: str = "") -> Check:
    """A check that a number is finite and in a range; the error gives the `hint` after the rule."""
    ends = {"at least": least, "above": above, "at most": most}
    rule = " and ".join(f"{word} {end}" for word, end in ends.items() if math.isfinite(end)) or "a finite number"

    def check(value: float, name: str) -> None:
        if not (-math.inf < value < math.inf and least <= value <= most and value > above):
            raise InputError(f"{name} must be {rule}{hint and f' ({hint})'}, got {value}")

    return check


def one_of(choices: Iterable[str]) -> Check:
    """A check that a text is one of several."""

    def check(value: str, name: str) -> None:
        if value not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

    return check


def read_by(parse: Callable[[str], object]) -> Check:
    """A check that a function can read a text; its own error says what it refuses."""
    return lambda value, _name: parse(value)


class Checked:
    """A record that checks its options when it is made: each by itself, unless None or the default, then together."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Checks them; a value that is refused is an `InputError`."""
        record: Any = type(self)
        for leaf in _own_leaves(record):
            leaf.refuse(getattr(self, leaf.path[0]), leaf.word)
        self.check_together()

    def check_together(self) -> None:
        """Refuses values that do not go together, and those of fields that are no option."""


@functools.cache
def _own_leaves(record: Any) -> tuple[Option, ...]:
    """What a record checks: a record inside checks its own."""
    return tuple(leaf for leaf in leaves(record) if len(leaf.path) == 1)


def block(default: Any, panel: str = "") -> Any:
    """A field that holds a record of more options, which people see under a heading of their own."""
    return field(default=default, metadata={_PANEL: panel})


def settings_of(function: Callable[..., object]) -> type:
    """A record of what a function takes; each parameter says how it is set by its `Option`, or a block by its heading.

    One that says nothing is no option, and `progress` is no setting.

    def run(out: Annotated[Path, Option(("-o", "--out"), "File to write.")], ...) -> ...
    """
    hints, found = typing.get_type_hints(function, include_extras=True), []
    for one in inspect.signature(function).parameters.values():
        kind, *how = get_args(hints[one.name]) or (hints[one.name],)
        default = REQUIRED if one.default is one.empty else one.default
        metadata = {_KEY if isinstance(told, Option) else _PANEL: told for told in how}
        if one.name != "progress":
            found.append((one.name, kind, field(default=default, metadata=metadata)))
    return dataclasses.make_dataclass("Settings", found, frozen=True)


def leaves(record: type, panel: str = "", path: tuple[str, ...] = ()) -> Iterator[Option]:
    """All that a person may set in a record, those of records in it included, in their order."""
    kinds = typing.get_type_hints(record)
    for one in dataclasses.fields(record):
        kind, place = unwrapped(kinds[one.name]), (*path, one.name)
        if _KEY in one.metadata:
            told: Option = one.metadata[_KEY]
            choices = told.choices or (get_args(kind) if get_origin(kind) is Literal else ())
            yield replace(told, path=place, kind=kind, default=one.default, panel=panel, choices=choices)
        elif _PANEL in one.metadata and isinstance(kind, type):
            yield from leaves(kind, one.metadata[_PANEL] or panel, place)


def set_in(record: object) -> list[Option]:
    """The leaves of a record whose value is not the default."""
    return [leaf for leaf in leaves(type(record)) if functools.reduce(getattr, leaf.path, record) != leaf.default]


def build(record: type[Record], given: Mapping[tuple[str, ...], object], path: tuple[str, ...] = ()) -> Record:
    """A record from the values that were given, by the fields that lead to them; what is not given has its default."""
    kinds, values = typing.get_type_hints(record), dict[str, object]()
    for one in dataclasses.fields(record):  # type: ignore[arg-type]  # every record is a dataclass
        place, kind = (*path, one.name), unwrapped(kinds[one.name])
        inside = [found for found in given if found[: len(place)] == place]
        if place in given:
            values[one.name] = given[place]
        elif _PANEL in one.metadata and isinstance(kind, type) and (inside or one.default is REQUIRED):
            values[one.name] = build(kind, given, place)
        elif one.default is REQUIRED and one.default_factory is dataclasses.MISSING:
            raise InputError(f"{one.name} is needed")
    return record(**values)


def read_words(record: type, words: Mapping[str, object]) -> dict[tuple[str, ...], object]:
    """Keywords of Python by the fields that they set; texts are read as they would be on the command line."""
    known, found = {leaf.word: leaf for leaf in leaves(record)}, dict[tuple[str, ...], object]()
    for word, value in words.items():
        if word not in known:
            raise InputError(f"there is nothing called {word!r} to set; there is: {', '.join(known)}")
        leaf = known[word]
        if leaf.choices:
            one_of(leaf.choices)(value, word)
        read = leaf.parse or (Path if leaf.kind is Path else None)
        found[leaf.path] = read(value) if read is not None and isinstance(value, str) else value
    return found


def unwrapped(kind: object) -> object:
    """A type without the None that it may be instead."""
    if get_origin(kind) in (types.UnionType, typing.Union):
        kept = [part for part in get_args(kind) if part is not types.NoneType]
        return kept[0] if len(kept) == 1 else kind
    return kind
