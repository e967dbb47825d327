"""The segmenter: what it learns on, its network, and its training, which a kill does not change."""

import dataclasses

import numpy as np
import pytest
import torch
from test_calibration import tiny_normalizer
from test_reader import config_for, normals, seen_by
from torch import nn

from backbone import backbone_name
from corrupted_normals import CorruptedCrops, mirrored
from crops import cropped
from features import FeatureExtractor, learns_to_segment
from reader import Reader
from reader_training import READER, train_reader
from segmenter import Segmenter
from segmenter_training import train_segmenter

pytestmark = pytest.mark.skipif(backbone_name("auto") == "none", reason="no backbone is installed")


def settings_for(**changes):
    given = {"features": ("latent", "segmenter"), "backbone": "auto", "segmenter_steps": 7, "crops": 2}
    return config_for(**given | changes)


# ---------------------------------------------------------------- what it learns on


def places_as_image(height=128, width=256):
    """An image whose grey level says in which column it lies, so that a crop shows where it was taken."""
    return np.broadcast_to(np.linspace(-1, 1, width, dtype=np.float32), (height, width)).copy()


@pytest.mark.parametrize("number", range(8))
def test_a_crop_lies_where_its_positions_say_mirrored_or_not(number):
    crops = CorruptedCrops([places_as_image()] * 2, settings_for(corrupted_share=0.0))
    image, changed, places = crops[number]
    assert image.shape == changed.shape == (1, 64, 128) and places.shape == (2, 4, 8) and changed.max() == 0
    level = image[0, 0].reshape(8, 16).mean(1)  # a mirrored image has its levels the other way round
    mirrored_here = level[0] > level[-1]
    torch.testing.assert_close(-level if mirrored_here else level, places[1, 0], atol=0.07, rtol=0)


def test_about_half_of_the_crops_are_mirrored_and_most_are_corrupted():
    crops = CorruptedCrops([places_as_image()] * 2, settings_for(fewest_corruptions=8, most_corruptions=10))
    items = [crops[number] for number in range(40)]
    assert 0.25 < np.mean([np.median(np.diff(image[0, 0])) < 0 for image, *_ in items]) < 0.75
    assert 0.5 < np.mean([float(changed.max()) for _, changed, _ in items]) < 1


def test_a_crop_is_drawn_by_its_number_alone():
    first, second = (CorruptedCrops(normals(), settings_for()) for _ in range(2))
    first[0]
    for one, other in zip(first[5], second[5], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_mirrored_crop_holds_what_the_crop_of_the_mirrored_image_holds():
    image, crop = np.arange(32.0).reshape(4, 8), (0.5, 0.25, 0.5)
    np.testing.assert_array_equal(cropped(image[:, ::-1], mirrored(crop)), cropped(image, crop)[:, ::-1])


# ---------------------------------------------------------------- the network


def test_features_and_verdict_lie_at_stride_four():
    hidden, logits = Segmenter(8)(torch.zeros(2, 1, 64, 128), torch.zeros(2, 2, 4, 8))
    assert hidden.shape == (2, 8, 16, 32) and logits.shape == (2, 1, 16, 32)


def test_it_learns_everywhere_but_in_the_statistics_of_batch_normalization():
    network = Segmenter(8).train()
    before = {name: value.clone() for name, value in network.named_buffers()}
    hidden, logits = network(torch.rand(2, 1, 64, 64), torch.zeros(2, 2, 4, 4))
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert not [module for module in network.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
    for name, value in network.named_buffers():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


# ---------------------------------------------------------------- training


def test_a_training_that_was_interrupted_ends_with_the_same_weights(tmp_path):
    last, cpu = tmp_path / "last.pt", torch.device("cpu")
    whole = train_segmenter(normals(), settings_for(), {}, tmp_path / "other.pt", cpu)
    stopped = settings_for()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segmenter_training.learning_rate", stops_at(6))
        with pytest.raises(KeyboardInterrupt):
            train_segmenter(normals(), stopped, {}, last, cpu)
    resumed = train_segmenter(normals(), stopped, {}, last, cpu)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=0, atol=0)


def stops_at(step):
    """A learning rate in whose way a kill comes."""
    from runtime import learning_rate

    def rate(now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return learning_rate(now, *rest)

    return rate


def test_it_learns_to_mark_what_changed(tmp_path):
    config = settings_for(segmenter_steps=60, fills=("saturate",), crops=4, lr=3e-3, largest_corruption=0.2)
    network = train_segmenter(normals(), config, {}, tmp_path / "last.pt", torch.device("cpu"))
    crops = CorruptedCrops(normals(), config)
    image, changed, places = (torch.stack(part) for part in zip(*(crops[n] for n in range(900, 916)), strict=True))
    share = nn.functional.avg_pool2d(changed, 4)
    logits = network(image, places)[1]
    assert logits[share > 0.9].mean() > logits[share == 0].mean() + 2


@pytest.fixture(scope="module")
def model():
    return tiny_normalizer(settings_for().inference)


def test_a_saved_reader_takes_its_segmenter_along(model, tmp_path):
    reader = train_reader(model, normals(), "pictures", settings_for(), tmp_path)
    again = Reader.load(tmp_path / READER)
    torch.testing.assert_close(again.logits(seen_by(model)), reader.logits(seen_by(model)), rtol=0, atol=0)
    assert again.sha256 == reader.sha256 and {path.suffix for path in tmp_path.iterdir()} == {".pt", ".png"}


def test_another_segmenter_is_another_reader(model, tmp_path):
    reader = train_reader(model, normals(), "pictures", settings_for(), tmp_path)
    other = FeatureExtractor(reader.settings, "cpu", Segmenter(reader.settings.width))
    assert dataclasses.replace(reader, extractor=other).sha256 != reader.sha256


def test_where_no_backbone_is_installed_there_is_nothing_to_fine_tune(model):
    without = settings_for(backbone="none")
    assert not learns_to_segment(without.reader) and learns_to_segment(settings_for().reader)
    assert len(FeatureExtractor(without.reader, "cpu")(seen_by(model))) == 1  # the latent is left
