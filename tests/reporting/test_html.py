"""The page: whole, self-contained, escaped, the same every time, and readable in both modes."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from report_examples import PROVENANCE, ahead, dit_summary, make_pictures, unet_summary

from sedimo.errors import InputError
from sedimo.pipelines import folder
from sedimo.reporting import html
from sedimo.reporting.html import MAX_BYTES, fitting, write_page
from sedimo.reporting.page import Picture
from sedimo.reporting.report_page import report_page
from sedimo.reporting.summary import Evidence, MeasuredRecipe
from sedimo.reporting.theme import BIT_LEVELS, DARK, LIGHT, PLACEHOLDER, bit_level

TEXT_CONTRAST, SHAPE_CONTRAST = 4.5, 3.0  # WCAG 2.2, 1.4.3 and 1.4.11
VOID = {"wbr", "meta", "img", "br", "link", "input", "hr"}
HARM = "<script>alert('x')</script>\"&$\\frac{1}$\x07`日本"


class Reader(HTMLParser):
    """Collects tags and ids, and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.ids, self.tags, self.links = [], [], Counter(), []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def render(summary, **words):
    return html.render(report_page(summary), **words)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page():
    return render(dit_summary())


@pytest.fixture(scope="module")
def bare_page():
    return render(unet_summary())


@pytest.mark.parametrize("which", ["page", "bare_page"])
def test_the_page_is_whole_and_needs_nothing_else(which, request):
    text = request.getfixturevalue(which)
    reader = read(text)
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.tags["script"] == 0
    assert reader.tags["h1"] == 1
    assert all(link.startswith(("#", "data:image/")) for link in reader.links)
    targets = {link[1:] for link in reader.links if link.startswith("#")}
    assert targets <= set(reader.ids)
    assert "default-src 'none'" in text
    without_names = re.sub(r'xmlns(:xlink)?="[^"]+"', "", text)
    assert "http:" not in without_names
    assert "https:" not in without_names
    assert "@import" not in text
    assert len(text.encode()) < MAX_BYTES / 5


def test_charts_take_their_colours_from_the_page(page):
    assert not any(colour in page.lower() for colour in PLACEHOLDER.values())
    assert "var(--b3)" in page
    assert r"\mathdefault" not in page
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", page)) - {"sans", "mono", "card-width"}
    assert used <= set(LIGHT)
    assert LIGHT.keys() == DARK.keys()


def test_all_parts_are_there_when_there_is_evidence(page):
    for part in ("decided", "why", "cost", "how", "words"):
        assert f'<section id="{part}">' in page
    assert page.count("<svg") == 5
    assert page.count('<table class="map') == 2
    assert page.count('<img src="data:image/png') == 3 * 8
    assert "sedimo quantize zoo:cifar-dit" in page


def test_parts_without_evidence_are_left_out(bare_page):
    assert 'id="cost"' not in bare_page
    assert 'href="#cost"' not in bare_page
    assert "<img" not in bare_page
    assert "not measured" in bare_page


@pytest.fixture
def quick(monkeypatch):
    """Charts that take no time, for tests of what is around them."""
    monkeypatch.setattr(html, "draw", lambda chart: f'<svg id="{chart.name}"></svg>')


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["recipes", "agreement", "frontier", "pictures", "file_bytes"])
def test_any_single_piece_of_evidence_may_be_absent(name):
    summary = dit_summary()
    evidence = replace(summary.evidence, **{name: getattr(Evidence(), name)})
    read(render(replace(summary, evidence=evidence)))


@pytest.mark.usefixtures("quick")
def test_any_single_piece_of_evidence_is_enough():
    summary = dit_summary()
    for name in ("recipes", "agreement", "frontier", "pictures"):
        evidence = Evidence(**{name: getattr(summary.evidence, name)})
        assert 'id="cost"' in render(replace(summary, evidence=evidence))


def test_untrusted_text_stays_text():
    summary = dit_summary()
    table, choice, name = summary.table, summary.allocation.choice, summary.chosen[5].decision
    costs = tuple(replace(c, decision=HARM) if c.decision == name else c for c in table.costs)
    told = {"layers": (HARM,), "operations": f"x.{HARM}", "blocks": f"x.{HARM}.0", "params": table.params[name]}
    facts = {key: {**getattr(table, key), HARM: value} for key, value in told.items()}
    for fact in facts.values():
        del fact[name]
    recipe = MeasuredRecipe(HARM, 3.5, 3.6, summary.evidence.recipes[0].measures, ahead(1.0, 0.2, 64))
    picture = replace(summary.evidence.pictures[0], label=HARM)
    evil = replace(
        summary,
        model=HARM,
        table=replace(table, costs=costs, denoiser=HARM, **facts),
        allocation=replace(summary.allocation, choice={**choice, HARM: choice[name]}),
        evidence=replace(
            summary.evidence, recipes=(*summary.evidence.recipes, recipe), pictures=(picture,), agreement_of=HARM
        ),
        provenance=replace(PROVENANCE, command=HARM, seeds=HARM, sampling={HARM: HARM}, notes=(HARM,)),
    )
    text = render(evil)
    assert read(text).tags["script"] == 0
    assert "<script" not in text
    assert "\x07" not in text
    assert "&lt;script&gt;" in text


def test_the_same_summary_gives_the_same_page(page):
    assert render(dit_summary()) == page


@pytest.mark.usefixtures("quick")
def test_a_theme_can_be_fixed():
    assert '<html lang="en" data-theme="dark">' in render(unet_summary(), theme="dark")


@pytest.mark.usefixtures("quick")
def test_writing_replaces_a_file_as_a_whole(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")
    monkeypatch.setattr(folder.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_page(report_page(unet_summary()), target)
    assert target.read_text() == "old"
    monkeypatch.undo()
    assert write_page(report_page(unet_summary()), target) == target
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"must exist, got .*nowhere"):
        write_page(report_page(unet_summary()), tmp_path / "nowhere" / "report.html")


@pytest.mark.usefixtures("quick")
def test_many_large_pictures_do_not_break_the_limit():
    summary = dit_summary()
    rng = np.random.default_rng(0)
    noisy = tuple(
        Picture(f"seed {i}", *(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8) for _ in range(2)))
        for i in range(24)
    )
    text = render(replace(summary, evidence=replace(summary.evidence, pictures=noisy)))
    assert len(text.encode()) < MAX_BYTES
    assert re.search(r"\d+ more were left out", text)


@pytest.mark.usefixtures("quick")
def test_a_report_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="must stay under 1000 bytes"):
        write_page(report_page(unet_summary()), tmp_path / "report.html")


def test_differences_of_pictures_are_grey_where_nothing_changed():
    import base64
    import io

    from PIL import Image

    same = Picture("same", *(make_pictures(1, 16)[0].reference for _ in range(2)))
    ((_, uris, _),) = fitting([same])
    data = base64.b64decode(uris["difference"].split(",")[1])
    assert (np.asarray(Image.open(io.BytesIO(data))) == 128).all()


@pytest.mark.parametrize(
    "pair",
    [
        (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 3), np.float32)),
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((8, 4, 3), np.uint8)),
    ],
)
def test_pictures_must_be_pairs_of_rgb(pair):
    with pytest.raises(InputError, match="picture 'p' must be two uint8 arrays"):
        fitting([Picture("p", *pair)])


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_suffices_in_both_modes(colours):
    for text in ("ink", "muted", "accent", "good", "bad", "other"):
        assert contrast(colours[text], colours["paper"]) >= TEXT_CONTRAST, text
    for text in ("ink", "muted"):
        assert contrast(colours[text], colours["card"]) >= TEXT_CONTRAST, text
    for level in BIT_LEVELS:
        assert contrast(colours[f"on{level}"], colours[f"b{level}"]) >= TEXT_CONTRAST, level
    assert contrast(colours["edge"], colours["paper"]) >= 2.9  # outlines of cells, which have text as well
    assert contrast(colours["accent"], colours["paper"]) >= SHAPE_CONTRAST


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_the_ramp_of_bits_is_monotone_in_lightness(colours):
    """So that it can be told apart in grey and without red-green vision."""
    ramp = [luminance(colours[f"b{level}"]) for level in BIT_LEVELS]
    steps = [b - a for a, b in itertools.pairwise(ramp)]
    assert all(s > 0 for s in steps) or all(s < 0 for s in steps)


@pytest.mark.parametrize(("bits", "level"), [(2.0, 2), (3.4, 3), (3.6, 4), (8.1, 8), (11.9, 8), (13.0, 16)])
def test_levels_of_the_ramp(bits, level):
    assert bit_level(bits) == level
