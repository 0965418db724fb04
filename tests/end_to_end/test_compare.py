"""All methods side by side on a tiny pipeline, as a person types it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from running import run, run_json
from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.errors import InputError
from sedimo.jobs import compare as comparing
from sedimo.jobs.compare import CompareSettings, agreement, compared_methods
from sedimo.jobs.settings import FormatSettings
from sedimo.lab.bench import SourceSettings
from sedimo.lab.seeds import SamplingSettings
from sedimo.methods import uniform
from sedimo.quant.formats import Format

QUICK = ("--seeds", "2", "--steps", "2", "--fresh", "4", "--formats", "uaq2,uaq3,uaq4,uaq6,kmc3,kmc4")
FEW = "uniform,error,jacobian,ablation,combined,sqnr,orthogonality,orthogonality-lp,orthogonality-noise,rank-average"


@pytest.fixture(scope="module")
def compared(tiny_pipeline_folder, tmp_path_factory):
    """A comparison without a search, done twice in one study, and its page."""
    folder = tmp_path_factory.mktemp("compare")
    arguments = ("compare", tiny_pipeline_folder, "--bits", "5,6", "--store", folder / "study", *QUICK)
    found = run_json(*arguments, "--methods", FEW, "-o", folder / "page.html")
    return found, arguments, folder


def test_every_method_is_measured_at_every_budget_on_the_same_fresh_seeds(compared):
    found, _, _ = compared
    assert [(row["method"], row["bits"]) for row in found["rows"]] == [(m, b) for b in (5, 6) for m in FEW.split(",")]
    assert all(row["sqnr_db"]["n"] == 4 for row in found["rows"])
    assert all(row["paper_bits"] <= row["bits"] for row in found["rows"] if row["method"] != "uniform")
    assert found["seeds"] == "2 to 5"  # the search had 0 and 1
    assert found["reference"] == "jacobian"
    assert [row["ahead"] for row in found["rows"] if row["method"] == "jacobian"] == [None, None]
    assert found["n_comparisons"] == 18
    by_name = {(r["method"], r["bits"]): r for r in found["rows"]}
    difference = by_name["sqnr", 5]["sqnr_db"]["value"] - by_name["jacobian", 5]["sqnr_db"]["value"]
    assert by_name["sqnr", 5]["ahead"]["value"] == pytest.approx(difference)


def test_methods_that_build_on_others_count_what_those_took(compared):
    costs = compared[0]["costs"]
    assert costs["error"]["denoiser_calls"] == 0
    assert costs["combined"]["denoiser_calls"] == (
        costs["jacobian"]["denoiser_calls"] + costs["ablation"]["denoiser_calls"]
    )
    assert costs["orthogonality-lp"]["denoiser_calls"] == costs["orthogonality"]["denoiser_calls"] > 0
    assert all(cost["is_complete"] for cost in costs.values())


def test_costs_do_not_depend_on_what_the_study_held(tiny_pipeline_folder, tmp_path):
    def compared_in(store, methods):
        arguments = ("--bits", "5", "--store", tmp_path / store, *QUICK, "--formats", "uaq3,uaq6", "--methods", methods)
        return run_json("compare", tiny_pipeline_folder, *arguments)["costs"]

    methods = "uniform,jacobian,ablation,combined"
    compared_in("resumed", "jacobian")
    before = compared_in("resumed", "uniform,combined")
    resumed, fresh = compared_in("resumed", methods), compared_in("fresh", methods)
    for method in methods.split(","):
        assert resumed[method]["denoiser_calls"] == fresh[method]["denoiser_calls"] > 0
        assert resumed[method]["seconds"] > 0
    assert resumed["combined"] == before["combined"]


def test_agreement_with_the_ablation_is_told_with_an_interval(compared):
    found = compared[0]["agreement"]
    about_itself = {"uniform", "ablation", "combined", "rank-average"}
    assert set(found) == set(FEW.split(",")) - about_itself
    assert all(-1 <= tau["low"] <= tau["value"] <= tau["high"] <= 1 for tau in found.values())


def test_a_second_run_measures_nothing_and_says_the_same(compared):
    found, arguments, _ = compared
    assert run_json(*arguments, "--methods", FEW) == found
    text = run(*arguments, "--methods", "jacobian,error").stdout
    assert "paired difference" in text


def test_the_page_stands_alone(compared):
    page = (compared[2] / "page.html").read_text()
    assert "<script" not in page
    for method in FEW.split(","):
        assert f'<td class="left">{method}</td>' in page
    assert "18 paired differences" in page
    assert 'id="methods-' in page
    best = {
        b: max((r for r in compared[0]["rows"] if r["bits"] == b), key=lambda r: r["sqnr_db"]["value"]) for b in (5, 6)
    }
    headline = page[page.index("Highest quality") :][:300]
    assert all(f"<code>{row['method']}</code>" in headline for row in best.values())


def test_the_search_is_one_of_the_methods(tiny_pipeline_folder, tmp_path):
    arguments = ("compare", tiny_pipeline_folder, "--bits", "5", "--store", tmp_path / "study", *QUICK)
    found = run_json(*arguments, "--methods", "gnn,jacobian", "--trials", "48")
    assert [row["method"] for row in found["rows"]] == ["jacobian", "gnn"]
    assert found["costs"]["gnn"]["denoiser_calls"] > found["costs"]["jacobian"]["denoiser_calls"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "5", "--methods", "guess"), "methods to compare are uniform, auto, error"),
        (("--bits", "x"), "numbers separated by commas"),
        (("--bits", ""), "at least one budget"),
        (("--bits", "5", "--fresh", "1"), "--fresh must be at least 2"),
        (("--bits", "1"), "least possible"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused(tiny_pipeline_folder, tmp_path, options, message):
    store = ("--store", tmp_path / "study")
    done = run("compare", tiny_pipeline_folder, *store, "--methods", "error", *QUICK, *options, code=3)
    assert message in done.output


def test_a_uniform_recipe_that_fits_no_budget_is_left_out_with_a_note(tiny_pipeline_folder, tmp_path, monkeypatch):
    arguments = ("compare", tiny_pipeline_folder, "--bits", "10", "--store", tmp_path / "study", *QUICK)
    narrow = ("--formats", "kmc4,fp16", "--methods", "uniform,error")  # one layer is too narrow for kmc4
    found = run_json(*arguments, *narrow)
    assert [row["method"] for row in found["rows"]] == ["uniform", "error"]
    assert found["notes"] == ["uniform at 10 bits: pos_embed.proj cannot take kmc4 and has fp16"]
    monkeypatch.setattr(uniform, "SLACK_BITS", -10.0)
    found = run_json(*arguments, *narrow)
    assert [row["method"] for row in found["rows"]] == ["error"]
    assert "uniform at 10 bits: left out: no uniform format takes at most 0.00 bits" in found["notes"][0]
    assert "left out" in run(*arguments, *narrow).stdout


def test_every_budget_is_checked_before_anything_is_fitted(tiny_pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sedimo.lab.lab.fit_bank", lambda *_args, **_named: pytest.fail("fitted"))
    with pytest.raises(InputError, match="least possible"):
        comparing.compare_methods(
            CompareSettings(SourceSettings(str(tiny_pipeline_folder)), (5.0, 1.0), tmp_path, methods="error")
        )


def test_agreement_is_about_the_tables_of_the_middle_budget(tiny_pipeline_folder, tmp_path, monkeypatch):
    seen, real = {}, comparing._accounted

    def accounted(lab, study, method, task):
        finding, used = real(lab, study, method, task)
        return replace(finding, table=replace(finding.table, method=str(task.budget.bits))), used

    monkeypatch.setattr(comparing, "_accounted", accounted)
    monkeypatch.setattr(comparing, "agreement", lambda tables, bits: seen.update(tables=tables, bits=bits) or {})
    sampling = SamplingSettings(n_seeds=2, n_steps=1)
    settings = CompareSettings(
        SourceSettings(str(tiny_pipeline_folder)),
        (5.0, 6.0, 7.0),
        tmp_path,
        methods="error",
        n_fresh=2,
        formats=FormatSettings("uaq4,uaq5"),
        sampling=sampling,
    )
    comparing.compare_methods(settings)
    assert seen["bits"] == 6.0
    assert seen["tables"]["error"].method == "6.0"


def table_of(method, costs):
    entries = tuple(Cost(n, f, c, 0.0, 0, 100, 100, 0) for n, f, c in costs)
    names = {n: (n,) for n, _, _ in costs}
    operations, blocks = {n: n[0] for n in names}, dict.fromkeys(names, "")
    return SensitivityTable(method, "", "Toy", entries, names, operations, blocks, dict.fromkeys(names, 200), {})


def test_agreement_is_kendalls_tau_of_operations():
    uaq4 = Format.parse("uaq4")
    truth = [("a1", 1.0), ("a2", 3.0), ("b1", 4.0), ("c1", 8.0), ("d1", 16.0)]
    tables = {
        name: table_of(name, [(n, uaq4, sign * c) for n, c in truth])
        for name, sign in (("ablation", 1.0), ("error", 2.0), ("jacobian", -1.0), ("combined", 1.0))
    }
    found = agreement(tables, 4.0)
    assert set(found) == {"error", "jacobian"}  # what holds the ablation agrees with itself
    assert found["error"].value == 1.0
    assert found["jacobian"].value == -1.0
    assert found["error"].n == 4  # a1 and a2 are one operation
    assert np.isfinite(found["error"].standard_error)
    assert agreement({"error": tables["error"]}, 4.0) == {}


def test_all_methods_have_a_name():
    names = [method.name for method in compared_methods()]
    assert len(set(names)) == len(names) == 15
