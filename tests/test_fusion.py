"""The regression that makes one map of many views, against scikit-learn and on views made to show one thing."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from config import CalibrationConfig
from fusion import Fusion, PixelSample, ScoreFusion, evidence, left_out_scores

SETTINGS = CalibrationConfig()
HEIGHT, WIDTH = 24, 32


def test_evidence_is_size_and_sign_of_a_deviation_up_to_the_largest():
    deviations = torch.tensor([-20.0, -1.0, 3.0]).reshape(1, 1, 1, 3)
    assert evidence(deviations, 10.0)[0, :, 0].tolist() == [[10.0, 1.0, 3.0], [-10.0, -1.0, 3.0]]


def test_the_map_is_minus_the_log_of_the_probability_scikit_learn_gives():
    rng = np.random.default_rng(0)
    rows, answers = rng.normal(size=(500, 12)).astype(np.float32), rng.random(500) < 0.3
    regression = LogisticRegression().fit(rows, answers)
    deviations = torch.from_numpy(rows[:, 6:])  # signs; sizes are made of them
    theirs = -regression.predict_log_proba(np.c_[deviations.abs(), deviations])[:, 0]
    fusion = Fusion(torch.from_numpy(regression.coef_[0]).float(), float(regression.intercept_[0]), 100.0)
    ours = fusion.anomaly_map(deviations[:, :, None, None])[:, 0, 0, 0]
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-5)


def noise(seed):
    return torch.randn(1, 2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def with_square(seed, shift):
    """Noise whose second view is shifted inside a square."""
    deviations, changed = noise(seed), np.zeros((HEIGHT, WIDTH), bool)
    row, column = seed % (HEIGHT - 6), 3 * seed % (WIDTH - 6)
    changed[row : row + 6, column : column + 6] = True
    deviations[0, 1][torch.from_numpy(changed)] += shift
    return deviations, changed


@pytest.fixture(scope="module")
def fitted():
    sample = PixelSample(SETTINGS, seed=0, normals=40)
    for seed in range(20):
        sample.add_corrupted(*with_square(seed, 6 * (-1) ** seed))
        sample.add_normal(noise(100 + seed))
    return sample.fit()


def test_views_that_nearly_say_the_same_are_fitted_to_the_optimum_and_not_to_where_a_solver_gave_up():
    sample = PixelSample(SETTINGS, seed=0, normals=40)
    mix = torch.randn(40, 2, generator=torch.Generator().manual_seed(9))
    for seed in range(20):
        deviations, changed = with_square(seed, 6 * (-1) ** seed)
        sample.add_corrupted(torch.einsum("fv,bvhw->bfhw", mix, deviations), changed)
    fusion = sample.fit()
    rows, answers = np.concatenate(sample.rows).astype(float), np.concatenate(sample.answers)
    wrong = 1 / (1 + np.exp(-rows @ fusion.weights.double().numpy() - fusion.bias)) - answers
    slope = wrong @ rows + fusion.weights.double().numpy() / SETTINGS.regularization
    assert np.abs(slope).max() < 1e-3  # of a sum over 18,000 pixels


@pytest.mark.parametrize("shift", [-6.0, 6.0])
def test_a_deviation_in_either_direction_lights_up_at_its_place(fitted, shift):
    deviations, changed = with_square(55, shift)
    shown = fitted.anomaly_map(deviations)[0, 0].numpy()
    assert np.median(shown[changed]) > np.quantile(shown[~changed], 0.99)


def test_a_view_that_never_tells_gets_no_weight(fitted):
    silent, telling = fitted.weights[0].abs(), fitted.weights[1].abs()
    assert silent < 0.1 * telling


def test_the_same_seed_gives_the_same_fusion(fitted):
    sample = PixelSample(SETTINGS, seed=0, normals=40)
    for seed in range(20):
        sample.add_corrupted(*with_square(seed, 6 * (-1) ** seed))
        sample.add_normal(noise(100 + seed))
    torch.testing.assert_close(sample.fit().weights, fitted.weights, rtol=0, atol=0)


# ---------------------------------------------------------------- scores of several readings


def readings(count, shift, seed):
    return np.random.default_rng(seed).normal(size=(count, len(shift))) * (1, 10) + shift


def test_a_fused_score_is_a_weighted_sum_in_standard_deviations_of_normals():
    normal, new = readings(40, (3, 5), 0), readings(7, (2, 10), 1)
    fused = ScoreFusion.of(normal, (1.0, 0.5))
    z = (new - normal.mean(0)) / normal.std(0, ddof=1)
    np.testing.assert_allclose(fused.score(new), z[:, 0] + z[:, 1] / 2, rtol=1e-5)


def test_each_normal_is_scored_in_units_of_the_others():
    normal = readings(20, (0, 0), 0)
    others = ScoreFusion.of(np.delete(normal, 7, axis=0), (1.0, 0.5))
    assert left_out_scores(normal, (1.0, 0.5), range(20))[7] == pytest.approx(others.score(normal[7:8])[0])


def test_a_score_is_in_units_of_other_patients():
    normal, patients = readings(9, (0, 0), 0), ["A", "A", "B", "B", "B", "C", "C", "D", "D"]
    others = ScoreFusion.of(normal[[0, 1, 5, 6, 7, 8]], (1.0, 0.5))
    assert left_out_scores(normal, (1.0, 0.5), patients)[3] == pytest.approx(others.score(normal[3:4])[0])


def test_thousands_of_normals_share_the_pixels_that_are_drawn_and_a_few_do_not():
    drawn = {}
    for normals in (40, 10_000):
        sample = PixelSample(SETTINGS, seed=0, normals=normals)
        sample.add_normal(torch.randn(1, 2, 64, 64))
        drawn[normals] = len(sample.rows[0])
    assert drawn == {40: SETTINGS.pixels_normal, 10_000: 10}
