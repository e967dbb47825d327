"""Corruptions: where they say they are, within range, drawn by the generator alone."""

import dataclasses

import numpy as np
import pytest
import scipy.ndimage as ndi

from checks import UsageError
from config_reading import CalibrationConfig, ReaderConfig
from corruption import FILLS, SHAPES, check_fills, corrupt

SETTINGS = CalibrationConfig()


def radiograph(seed=0, shape=(64, 128)):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    waves = np.sin(rows / 7 + seed) * np.cos(columns / (5 + seed))
    return (0.6 * waves).astype(np.float32)


def drawn(seed):
    return corrupt(radiograph(), radiograph(1), np.random.default_rng(seed), SETTINGS)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_changes_outside_the_mask(seed):
    corrupted, changed = drawn(seed)
    assert changed.any() and not changed.all()
    assert np.abs(corrupted - radiograph())[~changed].max() <= SETTINGS.most_corruptions * SETTINGS.least_change / 2


@pytest.mark.parametrize("seed", range(20))
def test_a_corrupted_radiograph_stays_a_radiograph(seed):
    corrupted, changed = drawn(seed)
    assert corrupted.dtype == np.float32 and changed.dtype == bool and corrupted.shape == changed.shape == (64, 128)
    assert -1 <= corrupted.min() and corrupted.max() <= 1


def test_as_many_shapes_as_wanted_are_drawn():
    """Four at most, and now and then all four: as many separate changes as shapes, where none overlap."""
    small = dataclasses.replace(SETTINGS, smallest_corruption=0.02, largest_corruption=0.03)
    counts = []
    for seed in range(60):
        _, changed = corrupt(radiograph(), radiograph(1), np.random.default_rng(seed), small)
        counts.append(ndi.label(ndi.binary_dilation(changed, iterations=2))[1])
    assert max(counts) >= 4


def test_the_generator_decides_everything():
    np.testing.assert_array_equal(drawn(3)[0], drawn(3)[0])
    assert np.abs(drawn(3)[0] - drawn(4)[0]).max() > SETTINGS.least_change


def test_the_normal_and_the_donor_are_left_alone():
    image, donor = radiograph(), radiograph(1)
    corrupt(image, donor, np.random.default_rng(0), SETTINGS)
    np.testing.assert_array_equal(image, radiograph())
    np.testing.assert_array_equal(donor, radiograph(1))


def test_corruptions_reach_from_a_few_pixels_to_a_good_part_of_the_jaw():
    shares = [drawn(seed)[1].mean() for seed in range(200)]
    assert min(shares) < 0.005 and max(shares) > 0.1


def test_corruptions_are_darker_as_often_as_brighter():
    signs = [np.sign((corrupted - radiograph())[changed].mean()) for corrupted, changed in map(drawn, range(200))]
    assert abs(np.mean(signs)) < 0.3


@pytest.mark.parametrize("shape", dict.fromkeys(SHAPES), ids=lambda shape: shape.__name__)
def test_an_opacity_lies_in_zero_to_one_and_ends_within_the_box_it_is_drawn_in(shape):
    rows, columns = np.mgrid[-40:41, -40:41].astype(np.float32)
    for seed in range(200):
        opacity = shape(rows, columns, 10.0, np.random.default_rng(seed))
        assert opacity.shape == rows.shape and opacity.min() >= 0 and opacity.max() <= 1
        assert opacity[np.maximum(abs(rows), abs(columns)) > 2.7 * 10 + 3].max() < 0.02


@pytest.mark.parametrize("name", FILLS)
def test_every_fill_changes_what_is_there(name):
    here = radiograph(2)
    opacity = SHAPES[0](*np.mgrid[-32:32, -64:64].astype(np.float32), 20.0, np.random.default_rng(0))
    there = FILLS[name](here, radiograph(1), opacity, 10.0, np.random.default_rng(1))
    assert there.shape == here.shape and np.isfinite(there).all() and np.abs(there - here).mean() > 0.01


@pytest.mark.parametrize("name", FILLS)
def test_one_fill_alone_corrupts_a_radiograph(name):
    alone = dataclasses.replace(ReaderConfig(), fills=(name,), smallest_corruption=0.03)
    corrupted, changed = corrupt(radiograph(), radiograph(1), np.random.default_rng(0), alone)
    assert changed.any() and np.abs(corrupted - radiograph())[changed].mean() > alone.least_change / 2


def test_what_is_removed_is_painted_over_from_around_it():
    """A bright disc on an even ground, removed, leaves the ground."""
    rows, columns = np.mgrid[-32:32, -32:32].astype(np.float32)
    disc = (np.hypot(rows, columns) < 10).astype(np.float32)
    opacity = np.clip(13 - np.hypot(rows, columns), 0, 1)
    painted = FILLS["remove"](disc - 0.5, disc, opacity, 10.0, np.random.default_rng(0))
    assert painted[np.hypot(rows, columns) < 8].mean() == pytest.approx(-0.5, abs=0.05)


def test_an_unknown_fill_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="reader.fills: glow is unknown, choose from level, offset"):
        check_fills(("level", "glow"), "reader.fills")


def test_fewest_and_most_corruptions_are_kept():
    small = dataclasses.replace(ReaderConfig(), smallest_corruption=0.02, largest_corruption=0.03, fills=("saturate",))
    few = dataclasses.replace(small, fewest_corruptions=1, most_corruptions=1)
    counts = {name: [] for name in ("small", "few")}
    for seed in range(20):
        for name, settings in (("small", small), ("few", few)):
            _, changed = corrupt(radiograph(), radiograph(1), np.random.default_rng(seed), settings)
            counts[name].append(changed.sum())
    assert np.mean(counts["small"]) > 3 * np.mean(counts["few"])


def test_fills_that_cannot_change_enough_are_refused_and_not_tried_for_ever():
    smooth, flat = dataclasses.replace(ReaderConfig(), fills=("smear",)), np.zeros((64, 128), np.float32)
    with pytest.raises(UsageError, match="fills smear change a radiograph by less than least_change"):
        corrupt(flat, flat, np.random.default_rng(0), smooth)
