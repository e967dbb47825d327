"""How far a latent lies from those of normals, in robust deviations."""

import numpy as np
import pytest

from typical import Typical, summary_of


def test_a_summary_is_the_mean_and_the_spread_of_each_channel():
    latents = np.random.default_rng(0).normal(size=(3, 2, 4, 5))
    assert summary_of(latents).shape == (3, 4)
    assert summary_of(latents)[1] == pytest.approx([*latents[1].mean((1, 2)), *latents[1].std((1, 2))])


def test_deviations_of_normals_are_those_of_a_normal_distribution_and_few_outliers_move_nothing():
    random = np.random.default_rng(0)
    values = 3 + random.normal(size=(4000, 1)) * 0.1
    clean, spoilt = Typical.of(values), Typical.of(np.concatenate([values, np.full((80, 1), 1e6)]))
    for typical in (clean, spoilt):
        assert typical.median[0] == pytest.approx(3, abs=0.01) and typical.spread[0] == pytest.approx(0.1, rel=0.05)
    assert clean.deviations(np.array([[3.5], [2.0]])) == pytest.approx([5, 10], rel=0.06)


def test_one_summary_that_lies_out_is_enough():
    typical = Typical((0.0, 0.0), (1.0, 0.1))
    assert typical.deviations(np.array([[0.5, 0.0], [0.5, -0.9]])) == pytest.approx([0.5, 9.0])
