"""Per-pixel statistics of normals, and scores that mean the same for a normal inside and outside the calibration set."""

import torch

from calibration import ALIGNMENT_SIGMA, calibrate_views, pixel_statistics
from image_ops import gaussian_blur


def normals(count, seed=0):
    return torch.randn(count, 2, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)


def test_mean_and_spread_are_those_of_the_neighbourhood():
    views = normals(50)
    statistics = pixel_statistics(views.sum(0, keepdim=True), views.square().sum(0, keepdim=True), 50)
    mean = gaussian_blur(views.mean(0, keepdim=True), ALIGNMENT_SIGMA)
    torch.testing.assert_close(statistics.mean, mean)
    torch.testing.assert_close(statistics.std.square(), gaussian_blur(views.square().mean(0, keepdim=True), ALIGNMENT_SIGMA) - mean.square())


def test_a_view_in_other_units_changes_nothing():
    views, scaled = normals(20), normals(20) * torch.tensor([1.0, 100.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(calibrate_views(views)[1], calibrate_views(scaled)[1])


def test_each_normal_is_scored_without_itself():
    views = normals(10)
    _, fused = calibrate_views(views)
    others, _ = calibrate_views(views[1:])
    torch.testing.assert_close(fused[:1], others.fuse(views[:1]))


def test_what_exceeds_the_normals_lights_up_and_what_does_not_stays_dark():
    statistics, _ = calibrate_views(normals(30))
    odd = statistics.mean.clone()
    odd[..., 4:8, 4:8] += 5 * statistics.std[..., 4:8, 4:8]
    fused = statistics.fuse(odd)
    torch.testing.assert_close(fused[..., 4:8, 4:8], torch.full_like(fused[..., 4:8, 4:8], 5.0))
    assert float(fused[..., 10:, 10:].abs().max()) == 0.0
