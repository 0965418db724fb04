"""What a page promises: every kind of cell and block is shown, HTML and terminal say the same, and text stays text."""

from __future__ import annotations

import html
import math
import re
from typing import get_args

import numpy as np
import pytest

from sedimo.errors import InputError
from sedimo.metrics.estimate import Estimate
from sedimo.quant.formats import Format
from sedimo.reporting.figures import Axis, Bar, Heat, Plot, ScoreBox, Series, named, only
from sedimo.reporting.html import render
from sedimo.reporting.page import (
    Beside,
    Block,
    Cell,
    Claim,
    Facts,
    Figure,
    Items,
    Legend,
    Map,
    Page,
    Picture,
    Row,
    Section,
    Swatch,
    Table,
    Text,
    Tile,
    say,
)
from sedimo.reporting.terminal import print_page
from sedimo.reporting.words import NOTHING, THIN, Kind, Value

HARM = "<script>alert('x')</script>\"&$\\frac{1}$`[bold]日本"
KMC3 = Format.parse("kmc3")
MEASURED = Estimate(9.7349, 0.31, 9.1, 10.35, 64)
VALUES: dict[str, Value] = {
    "a text": "as it is",
    "a format": KMC3,
    "a whole number": 123456,
    "a number": 9.7349,
    "a measured number": MEASURED,
    "name": "blocks.0.to_q",
    "verdict": "better",
    "count": 1.23e12,
    "bits": 3.5049,
    "fine bits": 3.5049,
    "bytes": 4_270_000,
    "change of bytes": -2048,
    "share": 0.4321,
    "seconds": 245.0,
    "change": MEASURED,
    "plus-minus": MEASURED,
}
SAID = {
    "a text": "as it is",
    "a format": "kmc3",
    "a whole number": "123,456",
    "a number": "9.73",
    "a measured number": "9.7 (9.1 to 10.3)",
    "name": "blocks.0.to_q",
    "verdict": "better",
    "count": "1.23 T",
    "bits": "3.50",
    "fine bits": "3.505",
    "bytes": "4.27 MB",
    "change of bytes": "\N{MINUS SIGN}2.05 kB",
    "share": "43 %",
    "seconds": "4 min 05 s",
    "change": "+9.7 (9.1 to 10.3)",
    "plus-minus": "9.7 ± 0.6",
}


def page_of(*blocks: Block, **words) -> Page:
    return Page("a page", sections=(Section("part", "A part", blocks),), **words)


def in_html(page: Page) -> str:
    """The words of a page in a browser."""
    text = render(page)
    body = re.sub(r"<(style|title)>.*?</\1>", "", text, flags=re.DOTALL).replace("<wbr>", "")
    return plain(html.unescape(re.sub(r"<[^>]+>", " ", body)))


def in_terminal(page: Page, capsys) -> str:
    print_page(page)
    return plain(capsys.readouterr().out)


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace(THIN, " "))


def test_every_kind_is_tested():
    assert set(VALUES) == set(SAID)
    assert {name for name in VALUES if not name.startswith("a ")} == set(get_args(Kind))


def kind_of(name: str) -> Kind | None:
    return None if name.startswith("a ") else name


@pytest.mark.parametrize("kind", VALUES)
def test_a_cell_reads_the_same_in_a_browser_and_on_a_terminal(kind, capsys):
    page = page_of(Table((Cell("what", kind_of(kind)),), (Row((VALUES[kind],)),)))
    assert SAID[kind] in in_html(page)
    assert SAID[kind] in in_terminal(page, capsys)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("value", [None, math.nan, Estimate(math.nan, math.nan, math.nan, math.nan, 0)])
def test_what_is_not_known_is_a_dash(kind, value):
    assert say(value, Cell("what", kind_of(kind))) == (NOTHING, "")


@pytest.mark.parametrize("kind", [None, "change", "plus-minus"])
def test_an_endless_value_has_no_interval(kind):
    text, quiet = say(Estimate(math.inf, math.nan, -math.inf, math.inf, 1), Cell("what", kind))
    assert (text, quiet) == ("∞", "")


def test_a_cell_may_differ_from_its_column_and_have_a_note():
    cell = Cell(0.25, "share", note="of the noise", before="* ")
    assert tuple(map(plain, say(cell, Cell("what", "bytes")))) == ("* 25 %", "of the noise")


def test_rows_must_fit_their_columns():
    with pytest.raises(InputError, match="a row of 1 columns has 2 cells"):
        Table((Cell("only"),), (Row((1, 2)),))


def figures(text: str, table: Table) -> tuple[Figure, ...]:
    places = Axis(text, named([text, "other"]), notes=(text, ""), bold=(text,))
    box = ScoreBox(text, 5, 0.0, 1.0, 2.0, 3.0, math.inf)
    panels = (
        Plot((Series((MEASURED, only(2.0)), label=text, line="-", has_band=True),), places, Axis(text), ((2.0, text),)),
        Plot((Series((MEASURED, MEASURED), bits=(2.0, 16.0)),), places, Axis(is_logarithmic=True), is_flat=True),
        Heat(((1.0, math.nan), (-math.inf, 2.0)), places, places, text, is_written=True, strip=(2.0, 4.0)),
        Plot((Bar(0, 0, 100, bits=3, text=text), Bar(1, 0, 50)), places, Axis(text), is_flat=True),
        Plot((box, box), places, Axis(text)),
    )
    around = {"legend": Legend(text, ()), "table": table}
    return tuple(
        Figure(f"chart-{i}", text, text, (panel,), 300, text, text, **around) for i, panel in enumerate(panels)
    )


def blocks(text: str) -> tuple[Block, ...]:
    """One of each, with a text everywhere."""
    table = Table((Cell(text, None, text),), (Row((Cell(text, note=text),), True, text),), text)
    pixels = np.zeros((4, 4, 3), np.uint8)
    *drawn, last = figures(text, table)
    return (
        Text(text),
        Text(text, "code"),
        Text(text, "heading"),
        Items((text,)),
        Facts(((text, text),)),
        Facts(((text, text),), is_glossary=True),
        Claim(text, text, (text,)),
        table,
        *drawn,
        Legend(text, (Swatch(text, 4, KMC3, text),)),
        Beside((last, Map(text, (text,), (text,), {(0, 0): Swatch(text, format=KMC3, is_copy=True)}))),
        Legend(text, (Swatch(text, 3), Swatch(text, 4)), (0.25, 0.75)),
        Beside((Picture(text, pixels, pixels),)),
        Section("", text, (Text(text),)),
        Text(text, "link", "#part"),
        Text(text, "link", text, "data.json"),
    )


def test_every_kind_of_block_is_tested():
    assert {type(block) for block in blocks("x")} == set(get_args(Block))


@pytest.mark.parametrize("text", [HARM, "plain"])
def test_every_block_is_shown_and_hostile_text_stays_text(text, capsys):
    page = page_of(*blocks(text), headline=text, tiles=(Tile(text, text, text, text),), warnings=(text,), created=text)
    shown = render(page)
    assert "<script" not in shown
    assert shown.count("<svg") == 5
    assert html.escape(text, quote=False).replace("'", "&#39;")[:20] in shown
    for section in (in_html(page), in_terminal(page, capsys)):
        assert section.count(plain(text).replace("`", "")[:25]) >= 5


def test_prose_has_names_emphasis_and_numbers_that_keep_their_percent_sign():
    assert "95&nbsp;%" in render(page_of(Text("an interval of 95 % is *usual*, `95 %` is a name")))
    assert "<em>usual</em>, <code>95 %</code>" in render(
        page_of(Text("an interval of 95 % is *usual*, `95 %` is a name"))
    )


def test_rows_of_a_group_stand_under_its_name():
    table = Table((Cell("a"),), (Row(("x",), group="one"), Row(("y",), group="one"), Row(("z",), group="two")))
    assert render(page_of(table)).count("<tbody>") == 2
