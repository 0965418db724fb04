"""One object in a tuple is all that a method, a treatment or a target is: the commands find it by themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from contracts.toys import TOY_METHOD, TOY_TREATMENT
from running import call, run, run_json
from sedimo import methods, targets, treatments
from sedimo.methods.method import Words
from sedimo.quant.fitting import quantize_weight
from sedimo.targets import DIFFUSERS

NOTE = "written for the toy target"
QUICK = ("--formats", "uaq4,fp16", "--seeds", "2", "--steps", "1")


def _write(packed, out, options, finish):
    written = DIFFUSERS.write(packed, out, options, finish)
    (out / "toy.txt").write_text(NOTE)
    return written


TOY_TARGET = replace(DIFFUSERS, name="toy-runner", words=Words("a folder with a note in it"), write=_write)


def _write_other_weights(packed, out, options, finish):
    others = {name: quantize_weight(-weight.dequantize(), "uaq4") for name, weight in packed.weights.items()}
    return DIFFUSERS.write(replace(packed, weights=others), out, options, finish)


WRONG_TARGET = replace(DIFFUSERS, name="wrong-writer", write=_write_other_weights)


@pytest.fixture(autouse=True)
def _toys_in_the_tuples(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, TOY_METHOD))
    monkeypatch.setattr(treatments, "TREATMENTS", (*treatments.TREATMENTS, TOY_TREATMENT))
    monkeypatch.setattr(targets, "TARGETS", (*targets.TARGETS, TOY_TARGET, WRONG_TARGET))


def test_help_and_refusals_name_them():
    shown = " ".join(run("quantize", "--help").stdout.split())
    assert "gnn" in shown
    assert " toy" in shown
    assert "toy-runner" in shown
    assert "--help-method" in shown
    assert (
        "--toy FLOAT  How many times the last weight.  [default: 2.0]" in run("quantize", "--help-method", "toy").stdout
    )
    wrong = call("quantize", "x", "--bits", "5", "--method", "magic", "-o", "out")
    assert "toy" in wrong.output


def test_the_main_job_plans_decides_writes_and_reports_by_them(tiny_pipeline_folder, tmp_path):
    order = ("quantize", tiny_pipeline_folder, "--bits", "8", "--method", "toy", "--target", "toy-runner", *QUICK)
    out = tmp_path / "out"
    assert run_json(*order, "-o", out, "--dry-run")["method"] == "toy"
    assert not out.exists()
    found = run_json(*order, "--no-check", "-o", out)
    assert found["method"] == "toy"
    assert (out / "toy.txt").read_text() == NOTE
    page = (out / "report.html").read_text()
    assert "toy" in page


def test_nothing_appears_where_a_target_writes_other_weights(tiny_pipeline_folder, tmp_path):
    order = ("quantize", tiny_pipeline_folder, "--bits", "8", "--method", "toy", "--target", "wrong-writer", *QUICK)
    found = call(*order, "--no-check", "-o", tmp_path / "out")
    assert "was not written as it was decided" in " ".join(found.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["out.study"]  # what was measured is kept


def test_a_comparison_has_the_method(tiny_pipeline_folder, tmp_path):
    order = ("compare", tiny_pipeline_folder, "--bits", "8", "--methods", "toy,error", "--fresh", "2", *QUICK)
    page = tmp_path / "page.html"
    found = run_json(*order, "--store", tmp_path / "run", "-o", page)
    assert {row["method"] for row in found["rows"]} == {"toy", "error"}
    assert "toy" in page.read_text()
