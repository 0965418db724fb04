"""What a result has to show, said once: facts, sentences, tables and figures, which `html` and `terminal` render.

Pure values. A page is made from a result by a pure function; nothing here formats, draws or reads a clock. How a cell
is said follows from its kind (`words.said`), so that a number reads the same wherever it is shown.

Sentences are prose: names between backticks become code, `*words*` emphasis.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sedimo.codec import from_plain
from sedimo.errors import InputError, StateError
from sedimo.quant.formats import Format
from sedimo.reporting.figures import WIDTH, Panel
from sedimo.reporting.words import Kind, Value, said


@dataclass(frozen=True, slots=True)
class Cell:
    """A value and how it is said, if not as its column says; `note` stands beside it, `before` in front of it.

    The head of a column is a cell, whose kind is how the values below are said, and whose note a second line.
    """

    value: Value
    kind: Kind | None = None
    note: str = ""
    before: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of a row; a marked one stands out. Rows of one `group` stand together under its name."""

    cells: tuple[Value | Cell, ...]
    is_marked: bool = False
    group: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns, each with a cell for every column."""

    columns: tuple[Cell, ...]
    rows: tuple[Row, ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise InputError(f"a row of {len(self.columns)} columns has {len(row.cells)} cells: {row.cells}")

    def is_text(self, index: int) -> bool:
        """Whether a column holds words, which are aligned left, and not numbers."""
        cells = [row.cells[index] for row in self.rows]
        values = [cell.value if isinstance(cell, Cell) else cell for cell in cells]
        return any(values) and all(value is None or isinstance(value, str | Format) for value in values)


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph, a quiet one, a heading inside a section, a command as it was typed, or a link.

    The `target` of a link is a section of the page, or, with a file's name, data that the page holds as JSON.
    """

    text: str
    look: Literal["plain", "quiet", "heading", "code", "link"] = "plain"
    target: str = ""
    file: str = ""


@dataclass(frozen=True, slots=True)
class Items:
    """Sentences one below the other: findings, or notes."""

    texts: tuple[str, ...]
    look: Literal["findings", "notes"] = "notes"


@dataclass(frozen=True, slots=True)
class Facts:
    """Names with what is known of each, or words with what they mean."""

    pairs: tuple[tuple[str, str], ...]
    is_glossary: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence with the verdict that measuring it gave, and quieter sentences below."""

    verdict: str
    sentence: str
    more: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Swatch:
    """A patch in the colour of its bits, with the mark of its format's method, or either; and what it means.

    On a map it is a layer; a copy is stored elsewhere.
    """

    text: str
    bits: float | None = None
    format: Format | None = None
    note: str = ""
    is_copy: bool = False


@dataclass(frozen=True, slots=True)
class Legend:
    """What colours and marks mean; as parts of one bar, if `shares` tell how large each is."""

    label: str
    entries: tuple[Swatch, ...]
    shares: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Map:
    """Layers by operation and block, coloured by bits and marked by method; cells by row and column."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[int, int], Swatch]


@dataclass(frozen=True, slots=True)
class Figure:
    """Panels below each other, which share their places, or in `n_columns` beside each other, which share their rows.

    `name` is unique in a page; `title` and `description` say in words what is seen. Sizes are in pixels. Around it
    stand a heading, what to see in it, a legend, and the same numbers as a table, if they fit on a page.
    """

    name: str
    title: str
    description: str
    panels: tuple[Panel, ...]
    height: float
    caption: str
    heading: str = ""
    width: float = WIDTH
    n_columns: int = 1
    ratios: tuple[float, ...] = ()
    label: str = ""
    legend: Legend | None = None
    table: Table | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """The same sample by both pipelines: uint8 arrays `[height, width, 3]`."""

    label: str
    reference: NDArray[np.uint8]
    quantized: NDArray[np.uint8]

    def __plain__(self) -> dict[str, str]:
        """The JSON form, as PNG in base64."""
        pair = {"reference": self.reference, "quantized": self.quantized}
        return {"label": self.label, **{name: base64.b64encode(png(one)).decode() for name, one in pair.items()}}

    @classmethod
    def __from_plain__(cls, plain: object, place: str) -> Picture:
        texts = from_plain(dict[str, str], plain, place=place)
        try:
            pair = [base64.b64decode(texts[name], validate=True) for name in ("reference", "quantized")]
            return cls(texts["label"], *(np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in pair))
        except (OSError, ValueError, KeyError) as error:
            raise StateError(f"a picture of the study is damaged: {error}") from error


@dataclass(frozen=True, slots=True)
class Beside:
    """Figures or maps side by side as far as there is room, or as many pictures as fit on the page."""

    parts: tuple[Figure | Map | Picture, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a name in its address; inside another one, details that a reader opens."""

    name: str
    title: str
    blocks: tuple[Block, ...]


Block = Text | Items | Facts | Claim | Table | Figure | Legend | Beside | Section
_CONTENT = {Text: "text", Items: "texts", Facts: "pairs", Table: "rows", Beside: "parts", Section: "blocks"}


@dataclass(frozen=True, slots=True)
class Tile:
    """One of the numbers of the first screen."""

    value: str
    unit: str
    label: str
    note: str


@dataclass(frozen=True, slots=True)
class Page:
    """A result: its title, the answer in a sentence, its numbers, what to beware of, and sections."""

    title: str
    headline: str = ""
    tiles: tuple[Tile, ...] = ()
    warnings: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()
    created: str = ""


def shown(*blocks: Block | Iterable[Block | None] | None) -> tuple[Block, ...]:
    """Those of the blocks that have something to show."""
    found = (b for one in blocks if one is not None for b in ((one,) if isinstance(one, Block) else one))
    return tuple(b for b in found if b is not None and (type(b) not in _CONTENT or getattr(b, _CONTENT[type(b)])))


def titled(title: str, block: Block) -> tuple[Block, ...]:
    """A block under a heading; neither, if it has nothing to show."""
    found = shown(block)
    return (Text(title, "heading"), *found) if found else ()


def png(pixels: NDArray[np.uint8]) -> bytes:
    """An image `[height, width, 3]` as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def say(value: Value | Cell, column: Cell) -> tuple[str, str]:
    """What a cell says, and what it says more quietly beside it: an interval, a note."""
    cell = value if isinstance(value, Cell) else Cell(value)
    text, quiet = said(cell.value, cell.kind or column.kind)
    return f"{cell.before}{text}", " ".join(part for part in (quiet, cell.note) if part)


def columns(*titles: str | tuple[str, Kind] | tuple[str, Kind | None, str]) -> tuple[Cell, ...]:
    """Columns by title, with a kind where values do not read well as what they are, and with a note."""
    return tuple(Cell(title) if isinstance(title, str) else Cell(*title) for title in titles)


def rows(cells: Iterable[Sequence[Value | Cell]]) -> tuple[Row, ...]:
    """Rows that are all alike."""
    return tuple(Row(tuple(one)) for one in cells)


def section(name: str, title: str, *blocks: Block | Iterable[Block | None] | None) -> Section:
    """A section of what has something to show."""
    return Section(name, title, shown(*blocks))


def page_of(title: str, headline: str, *blocks: Block | Iterable[Block] | None, name: str = "", part: str = "") -> Page:
    """A page of one section, which has a name and a title where they are given."""
    return Page(title, headline, sections=(section(name, part, *blocks),))
