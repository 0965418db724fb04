"""The methods of MPQ-Diff and of local SQNR, and block curves, as a person types them."""

from __future__ import annotations

import json

import pytest

from running import run, run_json
from sedimo.space import Recipe
from tolerances import FLOAT64_FORMULA

QUICK = ("--seeds", "2", "--steps", "2")


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("sqnr", (), "the noise at its own output"),
        ("orthogonality", ("--beta", "3", "--tau", "1"), "how little its output repeats that of other layers"),
        ("orthogonality", ("--importance-of", "noise"), "how little its output repeats that of other layers"),
        ("orthogonality-lp", ("--tail-mean",), "how little its output repeats that of other layers"),
    ],
)
def test_a_method_goes_from_source_to_checkpoint(tiny_pipeline_folder, tmp_path, method, options, words):
    out = tmp_path / "small"
    found = run_json(
        "quantize", tiny_pipeline_folder, "--bits", "5", "-o", out, "--method", method, "--formats", "uaq3,uaq4,uaq6",
        *options, *QUICK,
    )  # fmt: skip
    assert found["method"] == method.removesuffix("-lp")
    assert (found["status"] == "heuristic") == method.endswith("-lp")
    assert 4.5 < found["paper_bits"] <= 5
    assert "this recipe" in found["check"]["recipes"]
    kept = json.loads(run("allocate", f"{out}.study", "--bits", "5", "--rule", "lp", "--json").stdout)
    assert kept["bits"] <= 5
    # the published rule is never better on its own objective
    assert kept["objective"] >= found["objective"] - FLOAT64_FORMULA
    page = (out / "report.html").read_text()
    assert words in page
    assert ("What repeats what" in page, "the layers&#39; own outputs" in page) == (method != "sqnr", method == "sqnr")
    check_maps(found, method)
    again = run_json("report", f"{out}.study", "-o", tmp_path / "again.html")
    assert again["maps"] == found["maps"]
    assert (tmp_path / "again.html").read_text() == page


def check_maps(found, method):
    """Every block at every step, and lines that end where the check of the result does."""
    maps, blocks = found["maps"], ["pos_embed.proj", "transformer_blocks.0", "transformer_blocks.1"]
    assert maps["recipe"]["blocks"][:3] == blocks
    assert (len(maps["recipe"]["sqnr_db"][0]), maps["recipe"]["n"]) == (2, 8)
    lines = maps["trajectory"]
    assert lines["step"][0] == lines["path"][0]  # the first inputs are the same
    low, high = (found["check"]["recipes"]["this recipe"]["sqnr_db"][end] for end in ("low", "high"))
    assert low - 2 < lines["latents"][-1]["value"] < high + 2  # half of the seeds
    if method == "sqnr":
        assert [one["number_format"] != "" for one in maps["local"]] == [False, True]
        assert maps["repetition"] is None
    else:
        n = len(maps["repetition"]["layers"])
        assert len(maps["repetition"]["upper"]["mean"]) == n * (n - 1) // 2
        assert (maps["local"], len(maps["repetition"]["bits"])) == ([], n)


def test_block_curves_and_the_hybrid_recipe(tiny_pipeline_folder, tmp_path):
    store, file = tmp_path / "study", tmp_path / "hybrid.json"
    arguments = ("blocks", tiny_pipeline_folder, "--format", "uaq3", "--store", store, *QUICK)
    found = run_json(*arguments, "--keep", "2", "-o", file, "--page", tmp_path / "blocks.html")
    page = (tmp_path / "blocks.html").read_text()
    assert all(f"<code>{row['block'].replace('.', '.<wbr>')}</code>" in page for row in found["rows"])
    assert (found["seeds"], found["n_steps"], found["rule"]) == ("0 to 1", 2, "rank, the first 2 by gain")
    assert [row["block"] for row in found["rows"]][1:3] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert found["rows"][-1]["up_to"]["value"] == found["everything"]["value"]  # all blocks are quantized there
    assert len(found["kept"]) == 2
    assert found["hybrid_gain"]["n"] == 16  # fresh seeds
    recipe = Recipe.from_json(file.read_text())
    assert {name: str(entry) for name, entry in recipe.layers.items()} == found["recipe"]
    text = run(*arguments).stdout
    assert "gained by keeping it" in text
    assert "hybrid" not in text  # no rule, nothing kept
    assert (
        run_json("quantize", tiny_pipeline_folder, "--recipe", file, "-o", tmp_path / "out", *QUICK)["paper_bits"] < 16
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep", "1", "--bits", "5"), "give one rule"),
        (("--bits", "1"), "more than the budget of 1"),
        (("--bits", "nan"), "a budget must be positive, got nan"),
        (("--bits", "1e400"), "a budget must be positive, got inf"),
        (("--keep-db", "nan"), "--keep-db must be a finite number (a gain in dB, such as 1), got nan"),
        (("--keep", "1000"), "nothing would be quantized"),
        (("--objective", "fid"), "--objective must be one of final_latents, path, step, got 'fid'"),
    ],
)
def test_block_orders_that_make_no_sense_are_refused(tiny_pipeline_folder, tmp_path, options, message):
    store = ("--store", tmp_path / "study")
    assert message in run("blocks", tiny_pipeline_folder, "--format", "uaq3", *store, *options, *QUICK, code=3).output
