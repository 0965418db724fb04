"""Sets of images are compared with real ones, and with each other where they are pairs."""

from __future__ import annotations

import numpy as np
import pytest

from sedimo.errors import InputError
from sedimo.lab import images
from sedimo.lab.images import Features, compare_distributions
from sedimo.metrics.distribution import FeatureStatistics


@pytest.fixture
def drawn(monkeypatch):
    real, one, other = np.random.default_rng(0).normal(size=(3, 40, 4)).astype(np.float32)
    statistics = FeatureStatistics(real.mean(0).astype(np.float64), np.cov(real.T), len(real))
    monkeypatch.setattr(images, "_real", lambda: (Features("ours", real), statistics))
    return one, other


def test_sets_are_compared_with_real_images_and_with_each_other(drawn):
    reference, quantized = (Features("ours", values) for values in drawn)
    found = compare_distributions(reference, quantized)
    for name in ("fid", "kid"):
        difference = found[name].value - found[f"reference_{name}"].value
        assert found[f"{name}_difference"].value == pytest.approx(difference)
        assert {found[key].n for key in (name, f"reference_{name}", f"{name}_difference")} == {40}
    again = compare_distributions(reference, reference)["fid_difference"]
    assert (again.value, again.standard_error) == (0.0, 0.0)


def test_sets_that_are_no_pairs_are_refused(drawn):
    one, other = drawn
    with pytest.raises(InputError, match="different extractors do not compare: ours, theirs"):
        compare_distributions(Features("ours", one), Features("theirs", other))
    with pytest.raises(InputError, match="of one size"):
        compare_distributions(Features("ours", one), Features("ours", other[1:]))
