"""The page's explanation: there with its evidence, absent without, the same after saving, whatever the numbers."""

from __future__ import annotations

import base64
import html
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from explanation_examples import dit_explanation, explained, large_explanation
from report_examples import dit_summary, unet_summary
from test_html import HARM, read, render

from sedimo.codec import from_json, from_plain, to_json, to_plain
from sedimo.errors import StateError
from sedimo.jobs import report
from sedimo.lab.study import Study
from sedimo.methods.predictor.quality import Insight
from sedimo.metrics.estimate import Estimate
from sedimo.reporting import html as pages
from sedimo.reporting.explanation import Explanation, FormatShare, curve_figure, predictors_figure, score_boxes
from sedimo.reporting.html import MAX_BYTES
from sedimo.reporting.placement import block_labels
from sedimo.reporting.summary import Provenance, Summary
from sedimo.reporting.theme import LIGHT, PLACEHOLDER
from sedimo.reporting.words import EXPLANATION_GLOSSARY

INF, NAN = math.inf, math.nan
PARTS = (
    "operation_boxes", "block_boxes", "format_shares", "predictors", "folds", "curve", "insights", "rounds",
    "finalists", "notes",
)  # fmt: skip
EMPTY = Explanation("graph network", "SQNR [dB]", 480, "final_latents")
NOTHING = Estimate(NAN, NAN, NAN, NAN, 0)
ENDLESS = Estimate(INF, NAN, -INF, INF, 1)


@pytest.fixture(scope="module")
def page():
    return render(explained(dit_explanation()))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(pages, "draw", lambda chart: f'<svg id="{chart.name}"></svg>')


def plain_text(page: str) -> str:
    text = html.unescape(
        re.sub(r"</?(td|th|p|span)[^>]*>|<[^>]+>", lambda tag: " " if tag[1] else "", page[page.index("<main>") :])
    )
    return re.sub(r"\s+", " ", text.replace("\N{NARROW NO-BREAK SPACE}", " "))


def test_the_explanation_is_whole_and_needs_nothing_else(page):
    reader = read(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.tags["script"] == 0
    targets = {link[1:] for link in reader.links if link.startswith("#")}
    assert {"matters", "explanation"} <= targets <= set(reader.ids)
    others = [link for link in reader.links if not link.startswith(("#", "data:image/"))]
    assert len(others) == 1
    assert others[0].startswith("data:application/json;base64,")
    assert not any(colour in page.lower() for colour in PLACEHOLDER.values())
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", page)) - {"sans", "mono", "card-width"} <= set(LIGHT)
    assert render(explained(dit_explanation())) == page


def test_what_matters_comes_first(page):
    places = [page.index(f'<section id="{part}">') for part in ("matters", "decided", "why", "explanation", "cost")]
    assert places == sorted(places)


def test_the_page_holds_the_numbers(page):
    text = plain_text(page)
    assert "predicted +2.4 dB (1.7 to 3.1) · measured +2.90 dB (2.48 to 3.32) on 64 samples" in text
    assert text.count("✓ confirmed") == 2
    assert text.count("✗ refuted") == 1
    assert text.count("? open") == 1
    assert "graph network (used here) all recipes 480 0.950 (0.938 to 0.962)" in text
    assert "10.20 (9.64 to 10.76) 10.3" in text
    assert "built by the predictor 3.49 10.30 (9.70 to 10.90) chosen" in text
    assert "by jacobian alone 3.50 9.9" in text
    assert "Quality in each of the 4 folds" in text
    assert "12 of 492 trials diverged" in text
    for prefix in ("operation-scores", "block-scores", "format-shares", "curve", "predictors"):
        assert f'id="{prefix}-' in page


def test_the_whole_record_is_in_the_page_as_json(page):
    found = re.search(r'href="data:application/json;base64,([^"]+)" download="explanation.json"', page)
    assert from_json(Explanation, base64.b64decode(found.group(1))) == dit_explanation()


def test_other_reports_look_as_before(page):
    bare = render(dit_summary())
    for sign in ('id="matters"', 'id="explanation"', 'class="finding"', "application/json"):
        assert sign in page
        assert sign not in bare
    words = EXPLANATION_GLOSSARY
    assert all(f"<dt>{word}</dt>" not in bare for word in words)
    assert all(f"<dt>{word.replace(chr(39), '&#39;')}</dt>" in page for word in words)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", PARTS)
def test_any_part_may_be_absent_and_any_part_is_enough(name):
    read(render(explained(replace(dit_explanation(), **{name: ()}))))
    assert 'id="explanation"' in render(explained(replace(EMPTY, **{name: getattr(dit_explanation(), name)})))


def test_an_empty_explanation_says_what_it_knows():
    text = plain_text(render(explained(EMPTY)))
    assert "from 480 measured recipes. How well it ranks recipes that it has not seen was not measured." in text


def test_a_large_denoiser_fits():
    page = render(explained(large_explanation()))
    read(page)
    assert len(page.encode()) < MAX_BYTES / 3


def test_only_the_worst_operations_are_drawn_when_there_are_too_many():
    boxes = score_boxes({f"op {i}": (float(-i), 1.0) for i in range(60)})
    page = render(explained(replace(EMPTY, operation_boxes=boxes)))
    assert "12 operations with better medians are not drawn." in page
    assert ">op 59 (n = 2)</text>" in page
    assert ">op 3 (n = 2)</text>" not in page


def odd(kind: str) -> Explanation:
    e = dit_explanation()
    if kind == "endless":
        boxes = score_boxes({"a": (-INF, 0.0, 1.0), "b": (-INF, -INF), "c": (INF,), "d": (2.0,)})
        curve = tuple(replace(p, measured=ENDLESS) for p in e.curve)
        rows = tuple(replace(r, srcc=ENDLESS, mae=ENDLESS) for r in e.predictors)
        insights = tuple(replace(i, predicted_db=INF, measured=i.measured and ENDLESS) for i in e.insights)
        rounds = tuple(replace(r, best_db=ENDLESS, predicted_db=-INF) for r in e.rounds)
    else:
        boxes = score_boxes({"only": (-3.0,)})
        curve = tuple(replace(p, measured=replace(p.measured, value=NAN)) for p in e.curve[1:]) + e.curve[-1:]
        rows = tuple(
            replace(r, srcc=NOTHING, kendall_tau=NOTHING, ndcg_at_10=NOTHING, mae=NOTHING) for r in e.predictors
        )
        insights = (Insight("x", (), "kmc3", "kmc4", 0.0, measured=ENDLESS, verdict="open"),)
        rounds = tuple(replace(r, best_db=NOTHING, predicted_db=NAN) for r in e.rounds)
    folds = tuple(replace(f, srcc=NOTHING) for f in e.folds)
    parts = {"operation_boxes": boxes, "block_boxes": boxes, "predictors": rows, "folds": folds, "curve": curve}
    return replace(e, **parts, insights=insights, rounds=rounds)


@pytest.mark.parametrize("kind", ["endless", "missing"])
def test_a_page_is_made_of_odd_numbers_too(kind):
    page = render(explained(odd(kind)))
    read(page)
    assert "nan" not in re.sub(r"base64,[^\"]+", "", page).lower().replace("nano", "").replace("finance", "")


def test_endless_measurements_have_no_chart():
    assert curve_figure(odd("endless").curve, here=3.5) is None
    assert predictors_figure(odd("endless").predictors) is None


def test_untrusted_text_stays_text():
    e = dit_explanation()
    boxes = score_boxes({HARM: (1.0, 2.0)})
    evil = replace(
        e,
        predictor=HARM,
        target=HARM,
        objective=HARM,
        operation_boxes=boxes,
        block_boxes=boxes,
        format_shares=(FormatShare(HARM, {"kmc3": 2}, 10, 3.0),),
        predictors=tuple(replace(r, predictor=HARM, subset=HARM) for r in e.predictors),
        curve=tuple(replace(p, name=HARM) for p in e.curve[-8:]),
        insights=tuple(replace(i, sentence=HARM, decisions=(HARM,), from_format=HARM) for i in e.insights),
        notes=(HARM,),
    )
    page = render(explained(evil))
    assert read(page).tags["script"] == 0
    assert "<script" not in page
    assert "\x07" not in page


def test_a_report_is_the_same_after_saving(tmp_path):
    summary = replace(explained(dit_explanation()), provenance=Provenance(command="sedimo quantize"))
    with Study(tmp_path) as study:
        study.put_record(report.REPORT, summary)
    found = report.run(tmp_path)
    assert Path(found["report"]).read_text(encoding="utf-8") == render(summary)
    assert found["explanation"] == to_plain(summary.evidence.explanation)


def test_a_record_of_another_form_comes_with_a_remedy(tmp_path):
    with Study(tmp_path) as study:
        study.put_record(report.REPORT, {"summary": 1, "pictures": []})
    with pytest.raises(StateError, match=r"unknown fields.* give the job's command again"):
        report.run(tmp_path)


def test_a_damaged_picture_is_named():
    plain = to_plain(dit_summary())
    plain["evidence"]["pictures"][0]["quantized"] = "AAAA"
    with pytest.raises(StateError, match="a picture of the study is damaged"):
        from_plain(Summary, plain)


def test_records_of_earlier_versions_are_still_read():
    summary = unet_summary()
    plain = to_plain(summary)
    del plain["evidence"]["explanation"]
    assert from_plain(Summary, plain) == summary
    assert from_json(Summary, to_json(summary)) == summary


@pytest.mark.parametrize(
    ("blocks", "labels"),
    [
        (("0", "1"), ["0", "1"]),
        (("block 3", ""), ["block 3", "outside"]),
        (("transformer_blocks.0", "single_transformer_blocks.0"), ["transformer 0", "single_transformer 0"]),
        (("down_blocks.1.attentions.0.transformer_blocks.3", "outside blocks"), ["down 1.0.3", "outside"]),
        (("down_blocks.0.resnets.0", "down_blocks.0", "up_blocks.0"), ["down 0.0", "down 0", "up 0"]),
    ],
)
def test_blocks_have_short_labels(blocks, labels):
    assert block_labels(blocks)[0] == labels
