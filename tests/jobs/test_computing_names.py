"""Where a comparison keeps what methods computed: a name for each method, budget and way to set it."""

from __future__ import annotations

import pytest

from sedimo.jobs.compare import CompareSettings, compare_methods
from sedimo.jobs.settings import FormatSettings
from sedimo.lab.bench import SourceSettings
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import Study


@pytest.fixture
def names_of(tiny_pipeline_folder, tmp_path):
    """Names that a study has after a comparison."""

    def names(bits=(5.0,), methods="uniform,error", formats="uaq3,uaq6", **changes):
        settings = CompareSettings(
            SourceSettings(str(tiny_pipeline_folder)),
            bits,
            tmp_path / "study",
            methods=methods,
            n_fresh=2,
            formats=FormatSettings(formats, **changes),
            sampling=SamplingSettings(n_seeds=2, n_steps=1),
        )
        compare_methods(settings)
        with Study(tmp_path / "study", create=False) as study:
            return {name for name in study.record_names() if name.startswith("computing:")}

    return names


def test_each_method_has_a_name_at_each_budget_and_the_same_again(names_of):
    first = names_of()
    assert len(first) == 2
    assert names_of() == first
    more = names_of(bits=(5.0, 5.5), methods="error")
    assert len(more - first) == 1
    assert len(names_of(formats="uaq3,uaq6,uaq8", methods="error") - more) == 1
