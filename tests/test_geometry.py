"""Between the sizes of a file and of the model: images by area, masks by maximum, maps back where they came from."""

import tracemalloc

import numpy as np
import pytest

from radiographs.geometry import content, fit_detail, fit_image, fit_mask, unfit_map


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(100, 200), (200, 100), (33, 500), (64, 64), (20, 30)])
def test_fit_then_unfit_returns_a_smooth_image(shape, fit):
    x = np.add.outer(np.linspace(-0.5, 0.5, shape[0]), np.linspace(-0.4, 0.4, shape[1])).astype(np.float32)
    fitted = fit_image(x, 64, 96, fit)
    back = unfit_map(fitted, shape, fit)
    assert fitted.shape == (64, 96) and back.shape == shape and back.dtype == np.float32
    np.testing.assert_allclose(back, x, atol=0.08)  # a few source pixels at the ends of an axis


def test_an_image_of_the_right_size_is_left_as_it_is():
    x = np.random.default_rng(0).uniform(-1, 1, (64, 96)).astype(np.float32)
    for fit in ("stretch", "pad"):
        np.testing.assert_array_equal(fit_image(x, 64, 96, fit), x)
        np.testing.assert_array_equal(unfit_map(x, (64, 96), fit), x)


def test_shrinking_by_a_whole_factor_is_the_mean_of_the_blocks_even_while_the_other_axis_grows():
    x = np.random.default_rng(0).uniform(-1, 1, (64, 90)).astype(np.float32)
    np.testing.assert_allclose(fit_image(x, 32, 30, "stretch"), x.reshape(32, 2, 30, 3).mean((1, 3)), atol=1e-6)
    grown = fit_image(np.repeat(x[:16, :1], 90, axis=1), 8, 120, "stretch")
    np.testing.assert_allclose(grown, np.repeat(x[:16, :1].reshape(8, 2, 1).mean(1), 120, axis=1), atol=1e-6)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(40, 60), (64, 96), (100, 131), (33, 500), (640, 1280)])
def test_the_means_of_an_enlarged_radiograph_are_the_radiograph_as_g_knows_it(shape, fit):
    x = np.random.default_rng(0).uniform(-1.5, 1.5, shape).clip(-1, 1).astype(np.float32)  # some of it saturated
    detail = fit_detail(x, 64, 96, fit, 2)
    assert detail.shape == (128, 192) and detail.dtype == np.float32 and np.abs(detail).max() <= 1
    means = detail.reshape(64, 2, 96, 2).mean((1, 3))
    np.testing.assert_allclose(means, fit_image(x, 64, 96, fit), atol=1e-5)


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("shape", [(625, 1280), (628, 1280), (1991, 1127)])
def test_what_pad_adds_is_as_large_in_image_mask_and_map_and_nothing_lies_on_its_border(shape, times):
    detail = fit_detail(np.zeros(shape, np.float32), 64, 96, "pad", times)
    assert set(np.unique(detail)) == {-1, 0}
    np.testing.assert_array_equal(fit_mask(np.ones(shape, bool), 64, 96, "pad", times), detail == 0)
    np.testing.assert_array_equal(unfit_map(detail, shape, "pad", times), np.zeros(shape, np.float32))


@pytest.mark.parametrize("size", [100, 127, 200, 255])
def test_a_mask_that_grows_stays_where_it_is(size):
    """A picture is enlarged by the centres of its pixels, and so is its mask: mirrored, it is the mirror image."""
    mask = np.random.default_rng(size).random((size, size)) < 0.1
    here, there = (fit_mask(each, 256, 256, "stretch") for each in (mask, mask[::-1, ::-1]))
    np.testing.assert_array_equal(there, here[::-1, ::-1])


@pytest.mark.parametrize("shape", [(100, 300), (300, 100), (64, 64)])
def test_content_is_what_pad_did_not_add(shape):
    fitted = fit_image(np.ones(shape, np.float32), 64, 64, "pad")
    expected = np.full_like(fitted, -1)
    expected[content(shape, 64, 64, "pad")] = 1
    np.testing.assert_allclose(fitted, expected, atol=1e-6)
    assert fitted[content(shape, 64, 64, "stretch")].size == fitted.size


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_what_is_finer_than_the_finest_normal_is_left_out(fit):
    coarse = np.random.default_rng(0).uniform(-0.9, 0.9, (64, 96)).astype(np.float32)
    fine = np.kron(coarse, np.ones((4, 4), np.float32)) + np.where(np.arange(256) % 4 < 2, 0.1, -0.1)[:, None]
    known, limited = fit_detail(coarse, 64, 96, fit, 2), fit_detail(fine, 64, 96, fit, 2, (64, 96))
    np.testing.assert_allclose(limited, known, atol=1e-5)
    assert np.abs(fit_detail(fine, 64, 96, fit, 2) - known).mean() > 0.05
    np.testing.assert_array_equal(fit_detail(coarse, 64, 96, fit, 2, (200, 200)), known)  # a limit that nothing reaches


def test_a_file_of_the_enlarged_size_is_enlarged_by_nothing():
    x = np.random.default_rng(0).uniform(-1, 1, (128, 192)).astype(np.float32)
    np.testing.assert_allclose(fit_detail(x, 64, 96, "stretch", 2), x, atol=1e-6)
    np.testing.assert_array_equal(fit_detail(x, 64, 96, "stretch", 1), fit_image(x, 64, 96, "stretch"))


def test_a_long_and_narrow_file_takes_no_more_memory_than_it_has():
    x = np.random.default_rng(0).uniform(-1, 1, (4, 500_000)).astype(np.float32)
    tracemalloc.start()
    fit_image(x, 512, 1024, "stretch")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * x.nbytes


def test_pad_keeps_the_aspect_ratio_on_black():
    fitted = fit_image(np.ones((50, 100), np.float32), 96, 96, "pad")
    assert (fitted[24:72] == 1).all() and (fitted[:24] == -1).all() and (fitted[72:] == -1).all()


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(640, 1280), (50, 900), (33, 47)])
def test_fit_mask_keeps_a_lesion_of_one_pixel_wherever_it_lies(shape, fit):
    for row, column in np.random.default_rng(0).integers(0, shape, (100, 2)):
        mask = np.zeros(shape, bool)
        mask[row, column] = True
        assert fit_mask(mask, 64, 96, fit).any()


def test_fit_mask_by_a_whole_factor_is_the_maximum_of_the_blocks():
    mask = np.random.default_rng(0).random((64, 90)) < 0.1
    np.testing.assert_array_equal(fit_mask(mask, 32, 30, "stretch"), mask.reshape(32, 2, 30, 3).any((1, 3)))


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_a_lesion_lies_at_the_same_place_in_image_and_mask(fit):
    mask = np.zeros((300, 700), bool)
    mask[90:150, 400:520] = True
    image = fit_image(np.where(mask, 1, -1).astype(np.float32), 64, 96, fit)
    centres = [np.argwhere(there).mean(0) for there in (image > 0, fit_mask(mask, 64, 96, fit))]
    np.testing.assert_allclose(*centres, atol=0.6)
