"""Views, formula and score against values worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch

from anomaly import IMAGE_VIEWS, VIEWS, blur_share, check_views, image_score, plain_map, stacked_views, views_of
from checks import UsageError
from config import CalibrationConfig, InferenceConfig

SETTINGS = InferenceConfig(alpha_l1=2.0, beta_grad=3.0, gamma_hf=5.0)


def flat(value, channels=1, size=(16, 32)):
    return torch.full((1, channels, *size), float(value))


@pytest.fixture
def seen():
    """x = 0.5, its reconstruction 0.4, G(x) = 0.1; latents 1, 2, 3, 4 moved by 0.5, heads 0.2 apart."""
    z = torch.arange(1.0, 5.0).reshape(1, 4, 1, 1).expand(1, 4, 2, 4)
    estimate = SimpleNamespace(z=z - 0.5, z_diffusion=z - 0.7, x=flat(0.1))
    return SimpleNamespace(
        x=flat(0.5), z=z, normal=flat(0.1), reconstruction=flat(0.4), estimate=lambda level: estimate
    )


CLOSED_FORM = {
    "residual": 0.4,
    "change": 0.3,
    "formula": 2 * 0.4,  # flat images have no gradient and no Laplacian
    "formula_of_change": 2 * 0.3,
    "latent_distance": 0.5,
    "heads": 0.2,
    "latent_change": 0.5,
}


@pytest.mark.parametrize("name", VIEWS)
def test_each_view_of_flat_images_has_its_value_everywhere(name, seen):
    view = VIEWS[name](seen, seen.estimate(0.1), SETTINGS)
    torch.testing.assert_close(view, torch.full_like(view, CLOSED_FORM[name]))


def test_the_residual_of_the_autoencoder_is_x_minus_its_reconstruction(seen):
    torch.testing.assert_close(IMAGE_VIEWS["vae_residual"](seen), flat(0.1))


def test_residuals_keep_their_sign(seen):
    darker = SimpleNamespace(x=flat(-0.5), reconstruction=flat(-0.6))
    for name, value in (("residual", -0.6), ("change", -0.7)):
        torch.testing.assert_close(VIEWS[name](darker, seen.estimate(0.1), SETTINGS), flat(value))


def test_views_are_named_by_what_they_are_and_their_noise_level(seen):
    chosen = CalibrationConfig(views=("latent_change", "vae_residual", "heads"), levels=(0.1, 0.3))
    names = [f"latent_change.{channel}@{level}" for level in (0.1, 0.3) for channel in range(4)]
    assert list(views_of(seen, chosen, SETTINGS)) == [*names, "vae_residual", "heads@0.1", "heads@0.3"]
    assert stacked_views(seen, chosen, SETTINGS).shape == (1, 11, 16, 32)


def test_an_unknown_view_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="residuals is unknown, choose from vae_residual, residual, "):
        check_views(("residual", "residuals"))


def test_the_plain_map_of_a_step_is_the_formula_worked_out_by_hand():
    """A step of height 1 between columns 7 and 8: Sobel 1/2 and Laplacian 1 on both its sides, |.| a mean over d/dx
    and d/dy.
    """
    x = torch.zeros(1, 1, 16, 16)
    x[..., 8:] = 1
    shown = plain_map(x, torch.zeros_like(x), SETTINGS)[0, 0]
    edge = 3 * (0.5 / 2) + 5 * 1
    assert [float(shown[5, column]) for column in (2, 7, 8, 12)] == pytest.approx([0, edge, 2 + edge, 2])


def test_the_plain_map_agrees_with_scipy_on_noise():
    x, y = np.random.default_rng(0).normal(size=(2, 20, 24))
    residual = x - y
    sobel = [ndi.sobel(residual, axis=axis, mode="nearest") / 8 for axis in (0, 1)]
    laplace = ndi.laplace(residual, mode="nearest")
    expected = 2 * np.abs(residual) + 3 * np.abs(sobel).mean(0) + 5 * np.abs(laplace)
    ours = plain_map(torch.from_numpy(x)[None, None], torch.from_numpy(y)[None, None], SETTINGS)
    np.testing.assert_allclose(ours[0, 0], expected, atol=1e-12)


def test_the_score_is_the_mean_of_the_highest_share():
    values = torch.arange(100.0)[torch.randperm(100)].reshape(1, 1, 10, 10)
    assert image_score(values, 0.05).tolist() == [np.mean([95, 96, 97, 98, 99])]
    assert image_score(values, 0.001).tolist() == [99]
    assert image_score(values, 1.0).tolist() == [49.5]


def test_the_score_of_an_image_does_not_depend_on_its_neighbours():
    maps = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(image_score(maps, 0.1), torch.cat([image_score(one, 0.1) for one in maps.split(1)]))


@pytest.mark.parametrize("height", [64, 128])
def test_a_blur_means_the_same_at_every_resolution(height):
    """A blob of radius 1/8 of the height loses the same share of its peak."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, height), indexing="ij")
    blob = torch.exp(-(rows**2 + columns**2) / (2 * 0.125**2))[None, None]
    assert float(blur_share(blob, 0.0625).max()) == pytest.approx(0.5, abs=0.02)  # equal variances halve a 2-D peak
