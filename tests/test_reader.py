"""The learned reading: its network, its features, its pool and its training, on networks with random weights."""

import dataclasses
import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline import opens
from test_calibration import images, tiny_normalizer
from torch import nn

import interruption
from backbone import Backbone, backbone_name
from calibration import Calibration, calibrate, readings_of, shaping
from checks import UsageError
from config import Config, DataConfig, InferenceConfig, RuntimeConfig
from config_reading import ReaderConfig
from features import FEATURES, FeatureExtractor
from files import load_checkpoint
from image_ops import gaussian_blur
from interruption import Interrupted
from reader import (
    WHOLE,
    FeatureStatistics,
    Reader,
    ReaderEnsemble,
    ReaderNetwork,
    cropped,
    positions,
    stored_reader,
)
from reader_pool import KeptRows, Pool, make_pool, training_image
from reader_training import (
    LAST,
    LEARNING,
    POOL,
    READER,
    SHEET,
    deviations,
    fit_network,
    reader_identity,
    train_reader,
)
from standardization import PixelStatistics
from survey import maps_beside

ALL = ("image", "residual", "latent", "trunk", "encoder", "backbone")
OWN = ALL[:-1]


def config_for(**changes):
    given = {"features": OWN, "backbone": "none", "steps": 12, "copies": 1, "width": 8, "members": 2}
    given |= {"checkpoint_every": 5}
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
    FeatureExtractor(config_for(features=("image", "latent", "trunk", "encoder")).reader, "cpu")(seen)
    assert not {"normal", "reconstruction"} & set(vars(seen))


@pytest.mark.parametrize("name", OWN)
def test_each_feature_lies_on_the_grid_or_is_coarser_by_a_whole_factor(name, model):
    seen, settings = seen_by(model), config_for(features=(name,)).reader
    for part in FeatureExtractor(settings, "cpu")(seen):
        assert 32 % part.shape[-1] == 0 and part.shape[0] == 2 and torch.isfinite(part).all()


def test_latent_features_are_z_and_what_g_changed(model):
    seen, settings = seen_by(model), config_for(levels=(0.1, 0.3)).reader
    (found,) = FEATURES["latent"](seen, settings, None)
    assert found.shape[1] == 4 + 2 * (4 + 1)
    torch.testing.assert_close(found[:, :4] - found[:, 4:8], seen.estimate(0.1).z)


def test_an_unknown_feature_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="reader.features: smell is unknown, choose from image, residual"):
        FeatureExtractor(config_for(features=("smell",)).reader, "cpu")


def test_a_backbone_asked_for_by_name_must_be_there(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backbone_name("auto") == backbone_name("none") == "none"
    with pytest.raises(UsageError, match="pip install efficientnet-lite-pytorch"):
        backbone_name("efficientnet-lite0")


@pytest.mark.skipif(backbone_name("auto") == "none", reason="no backbone is installed")
def test_the_backbone_feels_at_four_strides_and_is_frozen():
    eye = Backbone()
    assert not any(parameter.requires_grad for parameter in eye.parameters()) and not eye.training
    shapes = [tuple(part.shape[1:]) for part in eye(torch.zeros(1, 1, 64, 128))]
    assert shapes == [(16, 32, 64), (24, 16, 32), (40, 8, 16), (112, 4, 8)]


@pytest.mark.skipif(backbone_name("auto") == "none", reason="no backbone is installed")
def test_folding_the_normalization_changes_no_feature(monkeypatch):
    """The published network, layer by layer, says the same of the same image, twice in a row."""
    monkeypatch.setattr("backbone.fold_normalization", lambda network: None)
    as_published = Backbone()
    assert sum(isinstance(part, nn.BatchNorm2d) for part in as_published.modules()) > 30
    monkeypatch.undo()
    folded = Backbone()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    x = torch.rand(2, 1, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = x.clone()
    for _ in range(2):  # an activation in place must not reach what was handed out
        for ours, theirs in zip(folded(x), as_published(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert torch.equal(x, before)


# ---------------------------------------------------------------- the network


def test_entering_before_enlarging_is_enlarging_before_entering():
    """A 1 x 1 convolution and bilinear interpolation commute: the weights of the second sum to 1."""
    enter, part = nn.Conv2d(6, 4, 1).double(), torch.randn(1, 6, 5, 7, dtype=torch.float64)
    enlarged = nn.Upsample(scale_factor=4, mode="bilinear")
    torch.testing.assert_close(enlarged(enter(part)), enter(enlarged(part)))


def test_positions_run_from_minus_one_to_one_and_a_crop_knows_where_it_lies():
    whole = positions((8, 16), [(0.0, 0.0, 1.0)], "cpu")
    assert whole[0, :, 0, 0].tolist() == [-1, -1] and whole[0, :, -1, -1].tolist() == [1, 1]
    torch.testing.assert_close(positions((8, 16), [(0.5, 0.25, 0.5)], "cpu"), whole[..., 4:8, 4:12])


def test_features_are_standardized_by_channel_and_by_place_where_the_crop_lies():
    places = PixelStatistics(torch.randn(1, 3, 4, 8), torch.rand(1, 3, 4, 8) + 0.5)
    known = FeatureStatistics(torch.ones(1, 3, 1, 1), torch.full((1, 3, 1, 1), 2.0), places)
    values, crop = torch.randn(1, 3, 4, 8), (0.5, 0.25, 0.5)
    whole = known.standardize(values, 100.0, [(0.0, 0.0, 1.0)])
    torch.testing.assert_close(whole[:, :3], (values - 1) / 2)
    torch.testing.assert_close(whole[:, 3:], (values - places.mean) / places.std)
    torch.testing.assert_close(known.standardize(cropped(values, crop), 100.0, [crop]), cropped(whole, crop))
    assert known.standardize(100 * values, 8.0, [(0.0, 0.0, 1.0)]).abs().max() == 8


# ---------------------------------------------------------------- the pool


@pytest.fixture
def pool(model, tmp_path):
    config = config_for()
    return make_pool(model, FeatureExtractor(config.reader, "cpu"), normals(), config, {}, tmp_path / POOL)


def test_the_pool_holds_normals_as_they_are_and_corrupted_copies(pool):
    assert pool.plain == 6 and pool.changed.shape == (12, 32, 32)
    assert pool.changed[:6].max() == 0 and all(pool.changed[row].max() > 0 for row in range(6, 12))


def test_statistics_of_the_pool_are_those_of_numpy(pool):
    known = pool.statistics(config_for(alignment=0.0, smallest_spread=0.0))
    for part, values in zip(known, pool.features, strict=True):
        plain = np.asarray(values[:6], np.float64)
        np.testing.assert_allclose(part.places.mean[0], plain.mean(0), atol=1e-5)
        np.testing.assert_allclose(part.places.std[0], plain.std(0).clip(1e-8), rtol=1e-2, atol=1e-4)
        np.testing.assert_allclose(part.scale.flatten(), plain.std((0, 2, 3)), rtol=1e-2, atol=1e-4)


def test_crops_of_features_and_of_what_changed_lie_at_one_place(pool):
    crop = (0.5, 0.25, 0.5)
    maps, changed = pool.batch([7], [crop]), pool.changed_share([7], [crop])
    torch.testing.assert_close(changed[0, 0], torch.from_numpy(np.array(pool.changed[7]))[16:, 8:24].float() / 255)
    assert {part.shape[-1] for part in maps} == {part.shape[-1] // 2 for part in pool.features}


def test_a_pool_that_was_interrupted_goes_on_and_is_the_same(pool, model, tmp_path):
    config, other = config_for(), tmp_path / "other"
    extractor = FeatureExtractor(config.reader, "cpu")
    make_pool(model, extractor, normals(), config, {}, other)
    stored = json.loads((other / "pool.json").read_text())
    (other / "pool.json").write_text(json.dumps(stored | {"done": 4}))
    for path in other.glob("*.npy"):
        np.load(path, mmap_mode="r+")[4:] = 0
    again = make_pool(model, extractor, normals(), config, {}, other)
    for part, expected in zip([*again.features, again.changed], [*pool.features, pool.changed], strict=True):
        np.testing.assert_array_equal(part, expected)


def test_a_pool_that_goes_on_is_kept_every_eight_batches_from_there(pool, model, tmp_path, monkeypatch):
    (tmp_path / POOL / "pool.json").write_text(
        json.dumps(json.loads((tmp_path / POOL / "pool.json").read_text()) | {"done": 3})
    )
    kept, keep = [], KeptRows.keep
    monkeypatch.setattr(KeptRows, "keep", lambda self: (kept.append(self.done), keep(self)))
    config = config_for()
    config = dataclasses.replace(config, inference=dataclasses.replace(config.inference, batch_size=1))
    make_pool(model, FeatureExtractor(config.reader, "cpu"), normals(), config, {}, tmp_path / POOL)
    assert kept == [11, 12]


def test_a_pool_whose_pictures_two_processes_made_is_the_same(pool, model, tmp_path):
    config = dataclasses.replace(config_for(), data=DataConfig(num_workers=2))
    theirs = make_pool(model, FeatureExtractor(config.reader, "cpu"), normals(), config, {}, tmp_path / "other")
    for part, expected in zip([*theirs.features, theirs.changed], [*pool.features, pool.changed], strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("spoil", ["remove", "cut", "junk"])
def test_a_pool_that_is_not_whole_is_made_anew(pool, model, tmp_path, spoil):
    folder, config = tmp_path / POOL, config_for()
    expected = [np.array(part) for part in [*pool.features, pool.changed]]
    path = sorted(folder.glob("*.npy"))[0]
    if spoil == "remove":
        path.unlink()
    elif spoil == "cut":
        path.write_bytes(path.read_bytes()[:500])
    else:
        (folder / "pool.json").write_text("[1")
    again = make_pool(model, FeatureExtractor(config.reader, "cpu"), normals(), config, {}, folder)
    for part, known in zip([*again.features, again.changed], expected, strict=True):
        np.testing.assert_array_equal(part, known)


def test_half_of_the_copies_keep_the_exposure_of_their_normal():
    """A copy whose corners are those of its normal was not exposed anew: no exposure gives a copy away."""
    images, config = normals(1), config_for(copies=60, fewest_corruptions=1, most_corruptions=1)
    kept = [np.array_equal(training_image(images, n, config)[0][-1, -4:], images[0][-1, -4:]) for n in range(1, 61)]
    assert 0.25 < np.mean(kept) < 0.75


# ---------------------------------------------------------------- training


def test_a_training_that_was_interrupted_ends_with_the_same_weights(pool, tmp_path, monkeypatch):
    config, last = config_for(), tmp_path / LAST
    known = pool.statistics(config)
    whole = fit_network(pool, known, config, {}, last, "cpu")
    assert last.is_file()  # after step 10 of 12
    taken, batch = [], Pool.batch
    monkeypatch.setattr(Pool, "batch", lambda self, *given: taken.append(1) or batch(self, *given))
    resumed = fit_network(pool, known, config, {}, last, "cpu")
    assert len(taken) == 2 * 2 * config.reader.members  # steps 11 and 12, both sides of the jaw
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=0, atol=0)


def test_a_signal_ends_the_pool_and_the_training_where_they_go_on(pool, model, tmp_path, monkeypatch):
    """SIGTERM in the first batch of features, then in the third step: nothing that was made is made again."""
    config, folder, last = config_for(), tmp_path / "other", tmp_path / LAST
    extractor, examine, batch = FeatureExtractor(config.reader, "cpu"), model.examine, Pool.batch
    interruption.running()

    def examine_and_be_told(*given):
        interruption._on_signal(signal.SIGTERM, None)
        return examine(*given)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(model, "examine", examine_and_be_told)
        make_pool(model, extractor, normals(), config, {}, folder)
    done = json.loads((folder / "pool.json").read_text())["done"]
    assert done == config.inference.batch_size < len(pool.changed)
    words = f"the same command goes on with the reader's features, {done} of {len(pool.changed)}"
    assert interruption.last_words(Interrupted(signal.SIGTERM)) == f"interrupted by SIGTERM: {words}"
    again = make_pool(model, extractor, normals(), config, {}, folder)
    np.testing.assert_array_equal(again.changed, pool.changed)

    known, calls = pool.statistics(config), []

    def batch_and_be_told(self, *given):
        calls.append(1)
        if len(calls) == 2 * 2 * config.reader.members + 1:
            interruption._on_signal(signal.SIGTERM, None)
        return batch(self, *given)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Pool, "batch", batch_and_be_told)
        fit_network(pool, known, config, {}, last, "cpu")
    assert load_checkpoint(last, "reader training", "")["step"] == 3
    assert "goes on with the reader, step 3 of 12" in interruption.last_words(Interrupted(signal.SIGTERM))
    resumed = fit_network(pool, known, config, {}, last, "cpu")
    whole = fit_network(pool, known, config, {}, tmp_path / "whole.pt", "cpu")
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=0, atol=0)


def test_a_network_learns_the_same_whether_or_not_others_learn_beside_it(pool, tmp_path):
    alone, both = (
        fit_network(pool, pool.statistics(config), config, {}, tmp_path / f"{config.reader.members}.pt", "cpu")
        for config in (config_for(members=1), config_for(members=2))
    )
    for name, weight in alone[0].state_dict().items():
        torch.testing.assert_close(both[0].state_dict()[name], weight, rtol=0, atol=0)


def test_each_network_begins_elsewhere_sees_other_crops_and_has_its_own_limit_of_steps(pool, tmp_path, monkeypatch):
    asked, clipped, batch, clip = [], [], Pool.batch, nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        Pool, "batch", lambda self, rows, crops: asked.append((rows, crops)) or batch(self, rows, crops)
    )
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda weights, most: clipped.append(len(list(weights))) or clip([], most)
    )
    config = config_for(steps=1, lr_warmup_steps=0, lr=1e-12, mirror=False)
    first, second = fit_network(pool, pool.statistics(config), config, {}, tmp_path / LAST, "cpu")
    assert len(asked) == 2 and asked[0] != asked[1]
    assert clipped == [len(list(first.parameters()))] * 2
    assert not torch.allclose(first.place.weight, second.place.weight)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("calibration"), config_for(steps=150, fills=("saturate", "noise"), lr=5e-3)
    return folder, config, train_reader(model, normals(), "pictures", config, folder)


def test_the_reader_finds_what_does_not_belong(trained, model):
    """Each of its networks does."""
    _, config, reader = trained
    image = normals(7)[6].copy()
    image[40:60, 70:90] = 1.0
    inside = np.zeros(image.shape, bool)
    inside[40:60, 70:90] = True
    for network in (reader.network, *(ReaderEnsemble([member]) for member in reader.network)):
        alone = dataclasses.replace(reader, network=network)
        logits = alone.logits(model.examine(torch.from_numpy(image)[None, None], 2))[0, 0].numpy()
        assert logits.shape == image.shape and np.median(logits[inside]) > np.quantile(logits[~inside], 0.95)


def test_a_saved_reader_reads_the_same_and_leaves_no_scratch_behind(trained, model):
    folder, _, reader = trained
    assert {path.name for path in folder.iterdir()} == {READER, SHEET} and opens(folder / SHEET)
    again = Reader.load(folder / READER)
    torch.testing.assert_close(again.logits(seen_by(model)), reader.logits(seen_by(model)), rtol=0, atol=0)
    assert again.belongs_to == reader.belongs_to and again.settings == reader.settings


@pytest.mark.parametrize(
    "change",
    [{"steps": 13}, {"levels": (0.2,)}, {"fills": ("level",)}, {"copies": 2}, {"members": 3}, {"distances": (1,)}],
)
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
    other = dataclasses.replace(reader, network=ReaderEnsemble([ReaderNetwork([1], 8, (1,), 0.0, False)]))
    assert shaping(model, config, reader) != shaping(model, config, other)


def test_a_reader_of_another_shape_than_its_settings_say_is_told_as_such(trained):
    content = stored_reader(trained[0] / READER)
    with pytest.raises(UsageError, match="of another version"):
        Reader.rebuild(content | {"settings": content["settings"] | {"members": 1, "width": 4}})


def test_a_reader_that_diverged_is_not_kept(model, tmp_path):
    config = config_for(lr=1e30, lr_warmup_steps=0)
    with pytest.raises(UsageError, match="the reader diverged: lower reader.lr, which is 1e.30"):
        train_reader(model, normals(), "pictures", config, tmp_path)
    assert not {READER, LAST} & {path.name for path in tmp_path.iterdir()}


def test_another_way_to_learn_takes_the_features_that_are_there_and_other_features_are_made(
    model, tmp_path, monkeypatch
):
    assert set(LEARNING) <= {field.name for field in dataclasses.fields(ReaderConfig)} | {"precision"}
    learning = {
        "members": 1,
        "width": 4,
        "distances": (1,),
        "mirror": False,
        "steps": 3,
        "crops": 2,
        "lr": 1e-4,
    }
    learning |= {
        "lr_warmup_steps": 1,
        "weight_decay": 0.0,
        "dropout": 0.0,
        "positive_weight": 1.0,
        "largest_deviation": 4.0,
    }
    learning |= {"smallest_spread": 0.5, "alignment": 0.1, "ema_decay": 0.5}
    learning |= {"tuned_lr": 1e-4, "tuned_steps": 1, "tuned_turn": 0.0, "tuned_stretch": 0.0, "tuned_unchanged": 0.5}
    assert set(learning) == set(LEARNING) - {"precision"}
    made, examine = [], type(model).examine
    monkeypatch.setattr(type(model), "examine", lambda self, *given: made.append(1) or examine(self, *given))
    with pytest.raises(UsageError, match="diverged"):
        train_reader(model, normals(), "p", config_for(lr=1e30, lr_warmup_steps=0), tmp_path)
    assert made and not made.clear()
    train_reader(model, normals(), "p", config_for(**learning), tmp_path)
    assert not made
    with pytest.raises(UsageError, match="diverged"):
        train_reader(model, normals(), "p", config_for(lr=1e30, lr_warmup_steps=0), tmp_path)
    assert made and not made.clear()
    train_reader(model, normals(), "p", config_for(least_change=0.05), tmp_path)
    assert made


def test_a_damaged_reader_names_the_file_to_remove(trained, tmp_path):
    (tmp_path / READER).write_bytes(b"reader")
    with pytest.raises(UsageError, match="run python inference.py after removing reader.pt"):
        Reader.load(tmp_path / READER)


def test_how_often_it_is_written_and_what_is_scored_make_no_other_reader(model):
    other = config_for(checkpoint_every=7, top_share=0.5, tuned_share=0.25, tuned_mirror=False)
    assert reader_identity(model, config_for(), "p") == reader_identity(model, other, "p")


def test_one_normal_is_too_few(model, tmp_path):
    with pytest.raises(UsageError, match="two training normals or more"):
        train_reader(model, normals(1), "p", config_for(), tmp_path)


def test_resume_false_trains_anew(pool, tmp_path, monkeypatch):
    config, last = config_for(), tmp_path / LAST
    fit_network(pool, pool.statistics(config), config, {}, last, "cpu")
    steps = []
    monkeypatch.setattr("reader_training.learning_rate", lambda step, *rest: steps.append(step) or 1e-3)
    anew = dataclasses.replace(config, runtime=RuntimeConfig(resume=False))
    fit_network(pool, pool.statistics(config), anew, {}, last, "cpu")
    assert steps == list(range(12))


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
    beside = known.beside_statistics.standardize(maps_beside(seen_by(model), config))
    np.testing.assert_allclose(scores, known.score_fusion.score(readings_of(shown, beside, config)))


def test_beside_the_reader_the_score_hears_the_plain_map_then_what_the_autoencoder_lost_both_calm(trained, model):
    x, dot = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
    dot[..., 32, 32] = 1.0
    _, config, reader = trained
    for where, other in ((0, {"normal": dot, "reconstruction": x}), (1, {"normal": x, "reconstruction": dot})):
        maps = maps_beside(SimpleNamespace(x=x, **other), config)[0]
        assert maps[1 - where].abs().max() == 0 and maps[where].argmax() == 32 * 64 + 32
        assert 0 < maps[where, 30, 32] < maps[where, 32, 32] < 0.5  # a pixel wide, it is hardly heard
    known = calibrate(model, np.stack(normals(5)), config, reader)
    assert known.score_fusion.weights == (1.0, config.reader.plain_weight, config.reader.residual_weight)


def test_a_score_that_is_not_a_number_passes_for_nothing(trained, model):
    _, config, reader = trained
    known = calibrate(model, np.stack(normals(5)), config, reader)
    with pytest.raises(UsageError, match="a score is not a number"):
        known.scores_of(seen_by(model), torch.full((2, 1, 128, 128), torch.nan), config)


def heard_by_one_verdict(mirror):
    """Rows and columns of the features that the verdict at row 32, column 12 of 64 depends on."""
    network = ReaderNetwork([3], 8, (1, 2, 4, 8), 0.0, mirror).eval()
    inputs = torch.randn(1, 6, 64, 64, requires_grad=True)
    opposite = [inputs.flip(-1)] if mirror else []
    network([inputs], opposite, positions((64, 64), [(0.0, 0.0, 1.0)], "cpu"))[0, 0, 32, 12].backward()
    rows, columns = (inputs.grad[0].abs().amax(0) > 0).nonzero().unbind(1)
    return {*rows.tolist()}, {*columns.tolist()}


def test_a_verdict_hears_of_fifteen_places_to_every_side_and_no_further():
    rows, columns = heard_by_one_verdict(mirror=False)
    assert (rows, columns) == (set(range(17, 48)), set(range(28)))


def test_with_mirror_it_hears_of_the_other_side_and_one_place_further():
    rows, columns = heard_by_one_verdict(mirror=True)
    assert rows == set(range(16, 49)) and columns == set(range(28)) | set(range(63 - 28, 64))


def test_the_network_has_no_way_to_see_beyond_its_inputs():
    """The same features at another place give another logit only through the position."""
    network = ReaderNetwork([3], 8, (1, 2, 4, 8), 0.0, False).eval()
    nn.init.zeros_(network.place.weight)
    flat, places = [torch.ones(1, 6, 40, 40)], positions((40, 40), [(0.0, 0.0, 1.0)], "cpu")
    inner = network(flat, [], places)[0, 0, 16:-16, 16:-16]
    torch.testing.assert_close(inner, inner[:1, :1].expand_as(inner))


def test_training_and_reading_give_the_network_the_same_other_side(pool, model, tmp_path, monkeypatch):
    """In training the part of the whole image's other side that lies across from the crop."""
    config, given, asked = config_for(steps=1, members=1, crops=1), [], []
    statistics, forward, batch = pool.statistics(config), ReaderNetwork.forward, Pool.batch
    monkeypatch.setattr(
        ReaderNetwork, "forward", lambda self, *inputs: given.append(inputs[:2]) or forward(self, *inputs)
    )
    network = ReaderEnsemble.untrained([part.centre.shape[1] for part in statistics], config.reader)
    Reader(network, statistics, FeatureExtractor(config.reader, "cpu"), {}).logits(seen_by(model, 1))
    own, opposite = given.pop(0)
    for part, across in zip(own, opposite, strict=True):
        assert torch.equal(across, part.flip(-1))
    monkeypatch.setattr(Pool, "batch", lambda self, *chosen: asked.append(chosen) or batch(self, *chosen))
    fit_network(pool, statistics, config, {}, tmp_path / LAST, "cpu")
    (rows, (crop,)), own, opposite = asked[0], *given[-1]
    assert crop[1] != 0.25  # else a crop would be its own mirror
    whole = deviations(pool, statistics, rows, [WHOLE], config.reader)
    for seen, across, part in zip(own, opposite, whole, strict=True):
        torch.testing.assert_close(seen, cropped(part, crop))
        torch.testing.assert_close(across, cropped(part.flip(-1), crop))


def test_without_mirror_nothing_of_the_other_side_is_read(pool, tmp_path, monkeypatch):
    asked, batch = [], Pool.batch
    monkeypatch.setattr(Pool, "batch", lambda self, *given: asked.append(given) or batch(self, *given))
    config = config_for(steps=2, mirror=False)
    network = fit_network(pool, pool.statistics(config), config, {}, tmp_path / LAST, "cpu")
    assert len(asked) == 2 * config.reader.members and not any("across" in name for name in network.state_dict())


def test_the_verdict_is_the_mean_of_networks_that_learnt_apart(trained, model):
    _, _, reader = trained
    seen, members = seen_by(model), list(reader.network)
    alone = [dataclasses.replace(reader, network=ReaderEnsemble([member])).logits(seen) for member in reader.network]
    assert len(members) == 2 and (alone[0] - alone[1]).abs().mean() > 0.01
    torch.testing.assert_close(reader.logits(seen), (alone[0] + alone[1]) / 2)


def test_normals_are_scored_by_the_smoothed_maps_that_new_images_are_scored_by(trained, model):
    _, config, reader = trained
    smooth = dataclasses.replace(config, inference=dataclasses.replace(config.inference, smooth_share=0.1))
    known = [calibrate(model, np.stack(normals(5)), each, reader) for each in (config, smooth)]
    shown = [one.anomaly_map(seen_by(model, 5), each) for one, each in zip(known, (config, smooth), strict=True)]
    rough, calm = (readings_of(maps, maps_beside(seen_by(model, 5), config), smooth)[:, 0].mean() for maps in shown)
    assert calm < rough
    assert known[1].score_fusion.centre[0] / known[0].score_fusion.centre[0] == pytest.approx(calm / rough, rel=0.3)
