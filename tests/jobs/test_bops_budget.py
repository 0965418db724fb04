"""A budget of bit operations: as it is written, before anything is measured, and in what comes out."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import sedimo
from sedimo.allocation.budget import BopsLimit, BudgetSettings
from sedimo.cli.main import main
from sedimo.errors import InputError
from sedimo.jobs import quantize as job
from sedimo.jobs.evaluate import evaluate
from sedimo.jobs.quantize import QuantizeSettings
from sedimo.jobs.settings import FormatSettings
from sedimo.lab.bench import SourceSettings
from sedimo.lab.lab import Lab
from sedimo.lab.seeds import SamplingSettings

FORMATS = "uaq2,uaq3,uaq4,uaq6,kmc4,fp16"


@pytest.mark.parametrize(
    ("text", "n_bops", "share"),
    [("350G", 350 * 10**9, None), ("1.5T", 15 * 10**11, None), ("2e9", 2 * 10**9, None), ("12.5%", None, 0.125)],
)
def test_texts_and_what_they_mean(text, n_bops, share):
    found = BopsLimit.parse(text)
    assert (found.n_bops, found.share) == (n_bops, share)
    assert found.resolved(1000) == (n_bops if share is None else 125)


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "0%", "101%", "nan", "inf", "1 X", "1e400", "9e30", "1,5T"])
def test_texts_that_are_no_budget(text):
    with pytest.raises(InputError):
        BopsLimit.parse(text)


def settings_of(source, out=None, method="error", **budget):
    return QuantizeSettings(
        SourceSettings(str(source)), BudgetSettings(**budget), out, method, FormatSettings(FORMATS), check=False
    )


def test_budgets_that_cannot_be_kept_together_are_named_before_anything_is_measured(tiny_pipeline_folder):
    """Each alone can be kept: few operations need uaq2, few bits cannot have it everywhere where kmc4 is smaller."""
    space = Lab(SourceSettings(str(tiny_pipeline_folder)), formats=FORMATS).space
    least = min(space.bops(space.uniform(f)) for f in space.common_formats)
    job.plan(settings_of(tiny_pipeline_folder, bops=BopsLimit("", n_bops=space.full_bops // 2)))
    with pytest.raises(InputError, match=f"the least possible is {least} bit operations .* attention takes"):
        job.plan(settings_of(tiny_pipeline_folder, bops=BopsLimit("", n_bops=least - 1)))
    with pytest.raises(InputError, match="Both must hold at once"):
        job.plan(settings_of(tiny_pipeline_folder, bits=9.0, bops=BopsLimit("", n_bops=least - 1)))
    with pytest.raises(InputError, match="draws recipes around a size"):
        settings_of(tiny_pipeline_folder, method="gnn", bops=BopsLimit.parse("20%"))


def test_a_share_binds_and_all_who_tell_operations_agree(tiny_pipeline_folder, tmp_path):
    budget = {"bits": 9.0, "bops": BopsLimit.parse("30%")}
    result = job.run(settings_of(tiny_pipeline_folder, tmp_path / "out", **budget))
    choice, told = result.allocation, result.as_json()
    assert choice.bops <= 0.3 * told["full_bops"]
    free = sedimo.allocate(result.finding.table, bits=9.0)
    assert free.bops > 0.3 * told["full_bops"]  # the limit matters
    assert choice.budget_bops == int(0.3 * told["full_bops"])
    assert "bit operations" in result.report.read_text()
    small, full = sedimo.load(tmp_path / "out"), sedimo.load(tiny_pipeline_folder)
    counted = evaluate(small, full, sampling=SamplingSettings(n_seeds=2, n_steps=1)).bops
    assert counted == {k: told[j] for k, j in zip(counted, ("bops", "full_bops", "attention_bops"), strict=True)}
    study = tmp_path / "out.study"
    again = CliRunner().invoke(main, ["allocate", str(study), "--bops", "30%", "--json"])
    alone = json.loads(again.stdout)
    assert alone["bops"] <= choice.budget_bops
    assert alone["objective"] <= choice.objective
