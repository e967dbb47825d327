"""Per-pixel statistics of normals, the fusion of views, and scores that mean the same for a normal inside and outside the calibration set."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from calibration import ALIGNMENT_SIGMA, BLURS, Fusion, NormalViews, evidence, features, fit_fusion, pixel_statistics
from image_ops import gaussian_blur

VIEWS, HEIGHT, WIDTH = 2, 24, 64


def normals(count, seed=0):
    """Noise around 2, five times as strong in the right half; the second view in units a thousand times as large."""
    noise = torch.randn(count, VIEWS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
    noise[..., WIDTH // 2 :] *= 5
    return (2 + noise) * torch.tensor([0.01, 10.0]).view(1, 2, 1, 1)


def implants(count, views):
    """Each normal with a square in its second view, bright and dark in turn."""
    for number in range(count):
        copy, changed = views[number % len(views)].clone().unsqueeze(0), np.zeros((HEIGHT, WIDTH), bool)
        row, column = number % (HEIGHT - 5), (5 * number) % (WIDTH // 2 - 5)
        changed[row : row + 5, column : column + 5] = True
        copy[0, 1][torch.from_numpy(changed)] += 30 * (-1) ** number
        yield number % len(views), copy, changed


@pytest.fixture(scope="module")
def fitted():
    views = normals(30)
    known = NormalViews(views)
    return known, *fit_fusion(known, implants(30, views), seed=0)


def test_mean_and_spread_are_those_of_the_neighbourhood():
    values = torch.randn(50, 3, 16, 24, dtype=torch.float64)
    statistics = pixel_statistics(values.sum(0, keepdim=True), values.square().sum(0, keepdim=True), 50)
    mean = gaussian_blur(values.mean(0, keepdim=True), ALIGNMENT_SIGMA)
    torch.testing.assert_close(statistics.mean, mean)
    torch.testing.assert_close(
        statistics.std.square(), gaussian_blur(values.square().mean(0, keepdim=True), ALIGNMENT_SIGMA) - mean.square()
    )


def test_features_are_the_views_at_every_blur():
    views = normals(3)
    for number, sigma in enumerate(BLURS):
        torch.testing.assert_close(
            features(views)[:, number * VIEWS : (number + 1) * VIEWS], gaussian_blur(views, sigma)
        )


@pytest.mark.parametrize("half", [slice(0, WIDTH // 2 - 20), slice(WIDTH // 2 + 20, WIDTH)], ids=["quiet", "noisy"])
def test_normals_deviate_by_about_one_standard_deviation_wherever_they_vary_little_or_much(half):
    known, new = NormalViews(normals(80)), normals(80, seed=1)
    deviations = known.statistics().standardize(new)[:, :VIEWS, :, half]
    torch.testing.assert_close(deviations.mean((0, 2, 3)), torch.zeros(VIEWS), atol=0.1, rtol=0)
    torch.testing.assert_close(deviations.std((0, 2, 3)), torch.ones(VIEWS), atol=0.1, rtol=0)


def test_each_normal_is_left_out_of_its_own_statistics():
    views = normals(10)
    without, others = NormalViews(views).statistics_without(0), NormalViews(views[1:]).statistics()
    torch.testing.assert_close(without.mean, others.mean)
    torch.testing.assert_close(without.std, others.std, rtol=1e-3, atol=1e-5)


def test_the_map_is_minus_the_log_of_the_probability_scikit_learn_gives():
    rng = np.random.default_rng(0)
    rows, answers = rng.normal(size=(500, 6)).astype(np.float32), rng.random(500) < 0.3
    regression = LogisticRegression().fit(
        evidence(torch.from_numpy(rows)[:, :, None, None])[..., 0, 0].numpy(), answers
    )
    fusion = Fusion(torch.from_numpy(regression.coef_[0]).float(), float(regression.intercept_[0]))
    ours = fusion.anomaly_map(torch.from_numpy(rows)[:, :, None, None])[:, 0, 0, 0]
    theirs = -regression.predict_log_proba(evidence(torch.from_numpy(rows)[:, :, None, None])[..., 0, 0].numpy())[:, 0]
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-5)


def test_what_differs_from_normals_lights_up_at_its_place(fitted):
    known, fusion, _ = fitted
    _, odd, changed = list(implants(8, normals(8, seed=2)))[7]
    anomaly_map = fusion.anomaly_map(known.statistics().standardize(odd))[0, 0].numpy()
    assert anomaly_map[changed].min() > np.quantile(anomaly_map[~changed], 0.9)


@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_a_deviation_in_either_direction_counts(fitted, shift):
    known, fusion, _ = fitted
    views = normals(1, seed=3)
    shifted = views + torch.tensor([0.0, shift]).view(1, 2, 1, 1)
    before, after = (fusion.anomaly_map(known.statistics().standardize(v)).mean() for v in (views, shifted))
    assert after > 3 * before


def test_a_normal_scores_alike_inside_and_outside_the_calibration_set(fitted):
    known, fusion, inside = fitted
    outside = fusion.anomaly_map(known.statistics().standardize(normals(30, seed=4)))
    assert float(inside.mean()) == pytest.approx(float(outside.mean()), rel=0.15)


def test_a_view_in_other_units_changes_nothing(fitted):
    views = normals(30) * torch.tensor([100.0, 0.01]).view(1, 2, 1, 1)
    scaled = [
        (index, copy * torch.tensor([100.0, 0.01]).view(1, 2, 1, 1), changed)
        for index, copy, changed in implants(30, normals(30))
    ]
    _, maps = fit_fusion(NormalViews(views), scaled, seed=0)
    torch.testing.assert_close(maps, fitted[2], rtol=0.05, atol=0.02)
