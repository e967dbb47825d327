"""A reader that learns on radiographs as other machines take them: what is changed, and what stays as it was."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from test_reader import config_for, normals

from augmentation import retaken
from checks import UsageError
from config import DataConfig
from config_reading import ReaderConfig, told_of
from reader_pool import training_image
from reader_training import LEARNING, reader_identity, seen_by_tuned
from tuned_training import Lessons

OTHERS = {"machine_blur": 0.003, "machine_noise": 0.06}


def draws(x, blur, noise, count=200):
    random = np.random.default_rng(0)
    return [retaken(x, blur, noise, random) for _ in range(count)]


def test_noise_is_white_and_up_to_what_was_asked_for():
    flat = np.zeros((64, 64), np.float32)
    spreads = [drawn.std() for drawn in draws(flat, 0, 0.06) if drawn is not flat]
    assert len(spreads) == pytest.approx(100, abs=25)  # the others are as they were
    assert np.mean(spreads) == pytest.approx(0.03, rel=0.15) and max(spreads) <= 0.06 * 1.05


def test_blur_is_a_gaussian_of_a_share_of_the_height():
    x = np.random.default_rng(1).uniform(-1, 1, (64, 64)).astype(np.float32)
    spreads = [drawn.std() for drawn in draws(x, 1 / 64, 0) if drawn is not x]
    assert gaussian_filter(x, 1.0).std() <= min(spreads) < max(spreads) <= x.std()


def test_values_stay_in_range():
    white = np.ones((64, 64), np.float32)
    assert max(drawn.max() for drawn in draws(white, 0.003, 0.5)) == 1


def test_who_asks_for_no_other_machine_draws_what_was_always_drawn():
    random, same = np.random.default_rng(0), np.random.default_rng(0)
    x = np.zeros((8, 8), np.float32)
    assert retaken(x, 0, 0, random) is x and random.random() == same.random()


@pytest.mark.parametrize("number", [0, 1])
def test_normals_of_the_pool_stay_as_they_are(number):
    images = normals(2)
    image, changed = training_image(images, number, config_for(**OTHERS))
    np.testing.assert_array_equal(image, images[number])
    assert not changed.any()


def test_what_was_changed_is_the_corruption_and_not_the_noise():
    images = normals(2)
    quiet, noisy = (
        [training_image(images, number, config_for(**settings)) for number in range(2, 14)] for settings in ({}, OTHERS)
    )
    assert all(np.array_equal(one, other) for (_, one), (_, other) in zip(quiet, noisy, strict=True))
    differ = [not np.array_equal(one, other) for (one, _), (other, _) in zip(quiet, noisy, strict=True)]
    assert 0 < sum(differ) < len(differ)


def test_the_tuned_backbone_learns_on_them_too():
    config = dataclasses.replace(config_for(tuned_steps=5, crops=4), data=DataConfig(num_workers=0))
    others = dataclasses.replace(config, reader=dataclasses.replace(config.reader, **OTHERS))
    quiet, noisy = (torch.cat([Lessons(normals(), each)[step][0] for step in range(5)]) for each in (config, others))
    assert quiet.shape == noisy.shape and not torch.equal(quiet, noisy)


def test_a_reader_that_knows_one_machine_is_called_what_it_always_was():
    settings = ReaderConfig()
    assert told_of(settings) == {k: v for k, v in vars(settings).items() if not k.startswith("machine_")}
    other = dataclasses.replace(settings, machine_noise=0.06)
    assert told_of(other) == told_of(settings) | {"machine_noise": 0.06}


@pytest.mark.parametrize("name", OTHERS)
def test_a_reader_of_other_machines_is_another_reader_with_another_pool_and_backbone(name):
    model = SimpleNamespace(identity={})
    usual, other = (reader_identity(model, config_for(**settings), "") for settings in ({}, {name: OTHERS[name]}))
    assert other == usual | {name: OTHERS[name]}
    assert seen_by_tuned(other) != seen_by_tuned(usual) and name not in LEARNING


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("value", [-0.1, 0.6, float("nan")])
def test_numbers_that_no_machine_has_are_refused(name, value):
    with pytest.raises(UsageError, match=f"reader.{name}"):
        ReaderConfig(**{name: value})
