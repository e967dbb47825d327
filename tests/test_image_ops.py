"""The operators against SciPy and against what calculus says, in float64."""

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
import torch.nn.functional as F

from image_ops import gaussian_blur, gradient, laplacian, residual_components


@pytest.fixture
def x():
    return torch.randn(2, 3, 12, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def per_plane(x, scipy_filter):
    """The SciPy filter on every (H, W) plane of x."""
    return torch.from_numpy(np.stack([[scipy_filter(plane) for plane in image] for image in x.numpy()]))


def test_gradient_is_scipys_sobel_over_8_first_dx_then_dy(x):
    dx = per_plane(x, lambda p: ndi.sobel(p, axis=1, mode="nearest") / 8)
    dy = per_plane(x, lambda p: ndi.sobel(p, axis=0, mode="nearest") / 8)
    torch.testing.assert_close(gradient(x), torch.cat([dx, dy], dim=1))


def test_laplacian_is_scipys(x):
    torch.testing.assert_close(laplacian(x), per_plane(x, lambda p: ndi.laplace(p, mode="nearest")))


@pytest.mark.parametrize("sigma", [0.5, 1.3, 4.0])  # at 4 the kernel is longer than the image
def test_blur_is_scipys(x, sigma):
    torch.testing.assert_close(
        gaussian_blur(x, sigma), per_plane(x, lambda p: ndi.gaussian_filter(p, sigma, mode="nearest", truncate=4))
    )


@pytest.mark.parametrize("sigma", [0, 0.05])
def test_blur_of_no_width_returns_its_input(x, sigma):
    torch.testing.assert_close(gaussian_blur(x, sigma), x, rtol=0, atol=0)


def test_negative_blur_is_refused(x):
    with pytest.raises(ValueError, match="sigma >= 0"):
        gaussian_blur(x, -1)


def test_a_plane_has_its_slopes_as_gradient_and_no_laplacian():
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    plane = (2 * columns - 3 * rows).view(1, 1, 9, 11).double()
    inner = gradient(plane)[..., 1:-1, 1:-1]
    torch.testing.assert_close(inner[:, 0], torch.full_like(inner[:, 0], 2))
    torch.testing.assert_close(inner[:, 1], torch.full_like(inner[:, 1], -3))
    assert laplacian(plane)[..., 1:-1, 1:-1].abs().max() == 0


def test_a_constant_has_no_gradient_or_laplacian_and_survives_blurring_also_at_the_border():
    constant = torch.full((1, 2, 5, 6), 0.7, dtype=torch.float64)
    assert gradient(constant).abs().max() == 0
    assert laplacian(constant).abs().max() < 1e-15
    torch.testing.assert_close(gaussian_blur(constant, 2.0), constant)


@pytest.mark.parametrize("operator", [gradient, laplacian, lambda x: gaussian_blur(x, 0.5)])
def test_moving_the_image_moves_the_result(x, operator):
    moved = operator(torch.roll(x, (2, 3), dims=(-2, -1)))
    torch.testing.assert_close(moved[..., 4:-2, 5:-2], operator(x)[..., 2:-4, 2:-5])


@pytest.mark.parametrize("operator", [gradient, laplacian, lambda x: gaussian_blur(x, 0.8)])
def test_derivatives_are_exact(operator):
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(operator, x)


def test_anomaly_components_are_differentiable(x):
    x, y = x[:1, :1, :4, :5].clone().requires_grad_(), x[1:, :1, :4, :5].clone().requires_grad_()
    assert torch.autograd.gradcheck(residual_components, (x, y))


def test_each_component_averages_to_the_l1_distance_of_what_it_compares(x):
    y = x.flip(0)
    expected = [F.l1_loss(x, y), F.l1_loss(gradient(x), gradient(y)), F.l1_loss(laplacian(x), laplacian(y))]
    components = residual_components(x, y)
    assert all(part.shape == (2, 1, 12, 17) for part in components)
    torch.testing.assert_close([part.mean() for part in components], expected)


def test_equal_images_have_no_anomaly_and_unequal_shapes_are_refused(x):
    assert all(part.max() == 0 for part in residual_components(x, x))
    with pytest.raises(ValueError, match="one shape"):
        residual_components(x, x[:1])


@pytest.mark.parametrize("operator", [gradient, laplacian, lambda x: gaussian_blur(x, 1.5)])
def test_autocast_does_not_touch_the_precision(x, operator):
    plain = operator(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(operator(x.float()), plain, rtol=0, atol=0)
    assert operator(x.bfloat16()).dtype == torch.bfloat16
