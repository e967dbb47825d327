"""Thresholds that normals set: the rate they keep, and how far the rate on new normals may be off."""

import numpy as np
import pytest
import scipy.stats

import thresholds
from thresholds import expected_false_positive_rate, false_positive_interval, threshold_from_normals


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("fpr", [0.0, 0.05, 0.29, 0.3, 0.99])
@pytest.mark.parametrize("part", [1, 3, 1000])
@pytest.mark.parametrize("n", [1, 7, 40, 100])
def test_a_threshold_is_the_smallest_that_keeps_the_rate_in_parts_of_any_size(rng, n, fpr, part, monkeypatch):
    monkeypatch.setattr(thresholds, "PART", part)
    values = np.round(rng.standard_normal(n), 1)
    threshold = threshold_from_normals(values, fpr)
    assert (values > threshold).sum() <= fpr * n + 1e-9
    assert (values > np.nextafter(threshold, -np.inf)).sum() > fpr * n + 1e-9


def test_false_positive_interval_is_where_the_binomial_says_it_is():
    low, high = false_positive_interval(40, 0.05, confidence=0.9)
    # The true rate lies below p exactly if at least k + 1 = 3 of the 40 normals exceed the (1 - p) quantile.
    assert scipy.stats.binom.sf(2, 40, low) == pytest.approx(0.05)
    assert scipy.stats.binom.sf(2, 40, high) == pytest.approx(0.95)


def test_false_positive_interval_covers_simulated_thresholds_as_often_as_it_says(rng):
    low, high = false_positive_interval(40, 0.05, confidence=0.8)
    rates = np.array(
        [1 - threshold_from_normals(normals, 0.05) for normals in rng.random((4000, 40))]
    )  # uniform: rate = 1 - threshold
    assert np.mean((low <= rates) & (rates <= high)) == pytest.approx(0.8, abs=0.02)
    assert rates.mean() == pytest.approx(expected_false_positive_rate(40, 0.05), abs=0.002)


@pytest.mark.parametrize("bad", [[], [1.0, np.nan], [-np.inf, 0.0]], ids=["nothing", "nan", "inf"])
def test_a_threshold_needs_finite_values(bad):
    with pytest.raises(ValueError, match="finite values of at least one normal"):
        threshold_from_normals(bad, 0.05)
