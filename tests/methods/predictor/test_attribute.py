"""A study of measured recipes gives a table, by the verb and by the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

import sedimo
from sedimo.cli.main import main
from sedimo.errors import InputError
from sedimo.jobs import attribute as attributing
from sedimo.jobs.attribute import AttributeSettings, attribute_study
from sedimo.methods.predictor.training import FAST, PAPER

QUICK = {
    "fast": replace(FAST, n_folds=2, n_epochs=2, patience=1),
    "paper": replace(PAPER, n_folds=2, n_epochs=2, patience=1),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(attributing, "OPTIONS", QUICK)


@pytest.fixture(scope="module")
def study(tiny_pipeline_folder, tmp_path_factory):
    pipe = sedimo.load(tiny_pipeline_folder)
    bank = sedimo.fit(pipe, sedimo.search_space(sedimo.trace(pipe), "uaq3,uaq4,uaq6,kmc3"))
    store = tmp_path_factory.mktemp("attribute")
    with (
        pytest.deprecated_call(),
        sedimo.explore(pipe, bank, store=store, trials=24, sampling=pipe.default_sampling(range(2), 2)) as found,
    ):
        yield found


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_a_study_gives_a_table_and_the_quality_behind_it(study, preset):
    found = attribute_study(study, AttributeSettings(study.path.parent, preset=preset))
    assert found.n_trials == 24
    assert found.target == "sqnr_db"
    assert {rating.predictor for rating in found.ratings} >= {
        "this predictor",
        "average bits",
        "jacobian costs, summed",
    }
    assert 0 <= found.calibration.r2 <= 1
    assert set(found.argmax) == {"operations", "groups"}
    assert all(len(recipe.layers) == 21 for recipe in found.argmax.values())
    chosen = sedimo.allocate(found.table, bits=5.0)
    assert chosen.paper_bits <= 5.0
    assert chosen.method == "gnn"


@pytest.mark.filterwarnings("ignore:sedimo.*ends with the next release")
def test_the_public_verb_reads_a_study(study):
    assert sedimo.attribute(study, "gnn").method == "gnn"
    with pytest.raises(InputError, match="'gnn' can"):
        sedimo.attribute(study, "jacobian")


def test_the_command_keeps_the_table_for_allocate(study):
    run = str(study.path.parent)
    result = CliRunner().invoke(main, ["attribute", run, "--target", "sqnr_db - 10*avg_bits", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["target"] == "sqnr_db - 10*avg_bits"
    assert found["trials"] == 24
    result = CliRunner().invoke(main, ["allocate", run, "--bits", "5", "--json"])
    assert json.loads(result.stdout)["bits"] <= 5
    result = CliRunner().invoke(main, ["allocate", run, "--rule", "argmin", "--json"])
    assert result.exit_code == 0, result.output
    shown = CliRunner().invoke(main, ["attribute", run])
    assert {"ridge", "one-hot", "choices"} <= set(shown.output.split())  # the name may be wrapped


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({"preset": "best"}, "preset must be one of fast, paper"),
        ({"objective": "beauty"}, "objective must be one of"),
        ({"target": "-beauty"}, "beauty"),
        ({"objective": "fid"}, "has 0 measured recipes by fid"),
    ],
)
def test_what_cannot_be_attributed_is_refused(study, order, message):
    with pytest.raises(InputError, match=message):
        attribute_study(study, AttributeSettings(study.path.parent, **order))
