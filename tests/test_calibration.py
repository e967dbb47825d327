"""What normals say: statistics that leave each normal out, thresholds, p-values, and files that say whose they are."""

import dataclasses
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calibration import FORMAT, Calibration, calibrate, shaping
from checks import UsageError
from config import CalibrationConfig, Config, InferenceConfig, UNetConfig, VAEConfig
from flowdiff_model import FlowDiffUNet
from image_ops import gaussian_blur
from latent_dataset import LatentStandard
from model import pretrained_vae
from normalizer import Normalizer
from radiographs.geometry import content
from standardization import NormalViews, features, pixel_statistics
from thresholds import false_positive_interval, threshold_from_normals

VIEWS, HEIGHT, WIDTH = 2, 32, 64
SETTINGS = CalibrationConfig(blurs=(1 / 32, 2 / 32), alignment=3 / 32)  # 1, 2 and 3 pixels


def views_of_normals(count, seed=0):
    """Noise around 2, five times as strong in the right half; the second view in units a thousand times as large."""
    noise = torch.randn(count, VIEWS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
    noise[..., WIDTH // 2 :] *= 5
    return (2 + noise) * torch.tensor([0.01, 10.0]).view(1, 2, 1, 1)


# ---------------------------------------------------------------- statistics


def test_features_are_the_views_at_every_blur_in_shares_of_the_height():
    views = views_of_normals(3)
    expected = torch.cat([gaussian_blur(views, sigma) for sigma in (1.0, 2.0)], dim=1)
    torch.testing.assert_close(features(views, SETTINGS.blurs), expected)


def test_mean_and_spread_are_those_of_numpy_where_statistics_are_not_shared():
    values = torch.randn(50, 3, 16, 24, dtype=torch.float64)
    alone = dataclasses.replace(SETTINGS, alignment=0.0, smallest_spread=0.0)
    sums = values.sum(0, keepdim=True), values.square().sum(0, keepdim=True)
    statistics = pixel_statistics(*sums, 50, alone)
    np.testing.assert_allclose(statistics.mean[0], values.numpy().mean(0), atol=1e-7)
    np.testing.assert_allclose(statistics.std[0], values.numpy().std(0), rtol=1e-6)


def test_neighbours_that_differ_in_mean_add_to_the_spread():
    """Two columns of constants 0 and 1, seen through a wide neighbourhood: variance p (1 - p) = 1/4 at the border."""
    values = torch.zeros(1, 1, 8, 64, dtype=torch.float64)
    values[..., 32:] = 1
    wide = dataclasses.replace(SETTINGS, alignment=0.5, smallest_spread=0.0)
    statistics = pixel_statistics(10 * values, 10 * values.square(), 10, wide)
    assert float(statistics.std[0, 0, 4, 31:33].mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("half", [slice(0, WIDTH // 2 - 20), slice(WIDTH // 2 + 20, WIDTH)], ids=["quiet", "noisy"])
def test_normals_deviate_by_one_standard_deviation_wherever_they_vary_little_or_much(half):
    known, new = NormalViews(views_of_normals(80), SETTINGS, SETTINGS.blurs), views_of_normals(80, seed=1)
    deviations = known.statistics().standardize(features(new, SETTINGS.blurs))[:, :VIEWS, :, half]
    torch.testing.assert_close(deviations.mean((0, 2, 3)), torch.zeros(VIEWS), atol=0.1, rtol=0)
    torch.testing.assert_close(deviations.std((0, 2, 3)), torch.ones(VIEWS), atol=0.1, rtol=0)


def test_each_normal_is_left_out_of_its_own_statistics():
    views = views_of_normals(10)
    without, others = (
        NormalViews(views, SETTINGS, SETTINGS.blurs).statistics_without(0),
        NormalViews(views[1:], SETTINGS, SETTINGS.blurs).statistics(),
    )
    torch.testing.assert_close(without.mean, others.mean)
    torch.testing.assert_close(without.std, others.std, rtol=1e-3, atol=1e-5)


def test_a_normal_is_left_out_with_all_of_its_patient():
    """Others of the same jaw know it: beside them it would look more usual than a new patient does."""
    views, patients = views_of_normals(40), [row // 4 for row in range(40)]
    known = NormalViews(views, SETTINGS, SETTINGS.blurs, patients)
    without, others = known.statistics_without(6), [row for row in range(40) if patients[row] != patients[6]]
    expected = NormalViews(views[others], SETTINGS, SETTINGS.blurs).statistics()
    assert known.statistics_without(5) is without and known.statistics_without(8) is not without
    torch.testing.assert_close(without.mean, expected.mean)
    torch.testing.assert_close(without.std, expected.std, rtol=1e-3, atol=1e-5)


def test_several_images_of_few_patients_flag_no_more_new_patients_than_is_said():
    """Ten patients with four visits each, whose maps are the patient's own but for a little."""
    rng = np.random.default_rng(0)

    def maps_of(patients, visits):
        own = rng.normal(size=(patients, 1, 1, 8, 8))
        visited = own + 0.3 * rng.normal(size=(patients, visits, 1, 8, 8))
        return torch.from_numpy(visited.reshape(-1, 1, 8, 8)).float()

    alone, flagged, naive = dataclasses.replace(SETTINGS, alignment=0.0, smallest_spread=0.3), [], []
    for _ in range(20):
        normals, new = maps_of(10, 4), maps_of(200, 1)
        for found, patients in ((flagged, [row // 4 for row in range(40)]), (naive, None)):
            known = NormalViews(normals, alone, patients=patients)
            scores = np.array([float(known.left_out(row).amax()) for row in range(40)])
            said = known.statistics().standardize(new).amax((1, 2, 3)).numpy()
            found.append((said > threshold_from_normals(scores, 0.05)).mean())
    low, high = false_positive_interval(10, 0.05)
    assert low < np.mean(flagged) < high < np.mean(naive)


def test_the_spread_of_thousands_of_calm_values_far_from_zero_is_not_lost_in_rounding():
    views = (10 + 0.05 * torch.randn(3000, 1, 2, 4, generator=torch.Generator().manual_seed(0))).half()
    alone = dataclasses.replace(SETTINGS, alignment=0.0, smallest_spread=0.0)
    statistics = NormalViews(views, alone, (0.0,)).statistics()
    torch.testing.assert_close(statistics.std[0], views.double().std(0, correction=0).float(), rtol=1e-4, atol=0)


# ---------------------------------------------------------------- thresholds and p-values


def calibration(scores, **changes):
    given = {
        "method": "plain",
        "belongs_to": {"seed": 0},
        "pixel_threshold": 0.5,
        "identity_error": 0.1,
        "vae_error": 0.05,
    }
    scale = {"residual": 1.0, "l1": 1.0, "gradient": 0.5, "anomaly_map": 2.0}
    return Calibration(scores=np.asarray(scores), scale=scale, **given | changes)


def test_a_p_value_counts_the_normals_that_score_as_high_and_the_image_itself():
    known = calibration([1.0, 2.0, 3.0, 4.0])
    assert [known.p_value(score) for score in (5.0, 4.0, 2.5, 0.0)] == [1 / 5, 2 / 5, 3 / 5, 1.0]


def test_p_values_of_new_normals_are_uniform():
    rng = np.random.default_rng(0)
    values = [calibration(rng.normal(size=19)).p_value(rng.normal()) for _ in range(4000)]
    for level in (0.05, 0.25, 0.5):
        assert np.mean(np.array(values) <= level + 1e-9) == pytest.approx(level, abs=0.03)


def test_the_rate_of_false_alarms_on_new_normals_lies_in_the_stated_interval():
    rng = np.random.default_rng(1)
    low, high = false_positive_interval(40, 0.05)
    thresholds = [calibration(rng.random(40)).score_threshold(0.05) for _ in range(2000)]
    inside = [low <= 1 - threshold <= high for threshold in thresholds]  # of uniform scores 1 - threshold lies above
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


# ---------------------------------------------------------------- from networks to a file


def tiny_normalizer(settings):
    """G with random weights; its maps mean nothing, but they are maps."""
    torch.manual_seed(0)
    scratch = VAEConfig(pretrained="scratch", freeze_encoder=False, scratch_channels=(8, 8, 8, 8))
    unet = UNetConfig(channels=(16,), attention=(False,), layers_per_block=1, norm_groups=8, attention_head_dim=8)
    network = FlowDiffUNet(unet, 4).requires_grad_(False).eval()
    for head in (network.noise_head, network.velocity_head):
        torch.nn.init.normal_(head[-1].weight, std=0.2)
    vae = pretrained_vae(scratch).requires_grad_(False).eval()
    return Normalizer(vae, network, LatentStandard((0.0,) * 4, (1.0,) * 4), settings)


def images(count=5, size=(64, 64)):
    return np.random.default_rng(0).uniform(-1, 1, (count, *size)).astype(np.float32)


def config_with(method, **changes):
    settings = CalibrationConfig(levels=(0.2,), corrupted=6, pixels_normal=100, **changes)
    inference = InferenceConfig(method=method, solver="one_step", batch_size=2, top_share=0.05)
    return Config(inference=inference, calibration=settings)


@pytest.fixture(scope="module", params=["plain", "statistical"])
def made(request):
    config = config_with(request.param)
    model = tiny_normalizer(config.inference)
    return config, model, calibrate(model, images(), config)


def test_calibration_speaks_of_every_normal_and_its_thresholds_hold_on_them(made):
    config, _, known = made
    assert known.scores.shape == (5,) and np.isfinite(known.scores).all()
    assert (known.scores > known.score_threshold(0.05)).mean() <= 0.05
    assert all(value > 0 for value in known.scale.values()) and known.identity_error > 0 and known.vae_error > 0


def test_views_are_named_in_the_calibration(made):
    config, _, known = made
    names = [
        "vae_residual",
        "residual@0.2",
        "change@0.2",
        "formula@0.2",
        "formula_of_change@0.2",
        "latent_distance@0.2",
    ]
    names += ["heads@0.2", *(f"latent_change.{channel}@0.2" for channel in range(4))]
    assert list(known.view_names) == (names if known.method == "statistical" else [])


def test_a_saved_calibration_gives_the_same_maps(made, tmp_path):
    config, model, known = made
    known.save(tmp_path)
    again = Calibration.load(tmp_path, known.method)
    seen = model.examine(torch.from_numpy(images(2)).unsqueeze(1))
    torch.testing.assert_close(again.anomaly_map(seen, config), known.anomaly_map(seen, config))
    assert (again.belongs_to, again.view_names, again.scale) == (known.belongs_to, known.view_names, known.scale)
    np.testing.assert_array_equal(again.scores, known.scores)


class Transfers(TorchDispatchMode):
    """Counts tensors that are copied to a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and "device" in (kwargs or {})
        return function(*args, **kwargs or {})


def test_what_normals_say_lies_where_the_model_computes_and_does_not_travel_with_each_batch(made, monkeypatch):
    """On a device that has shapes and no numbers, and takes no part in a sum with tensors of another."""
    config, _, known = made
    monkeypatch.setattr(torch, "autocast", lambda *given, **how: nullcontext())  # it knows no such device
    model, known = tiny_normalizer(config.inference), known.to("meta")
    assert model.vae.to("meta") and model.network.to("meta")
    seen = model.examine(torch.zeros(2, 1, 64, 64))
    known.anomaly_map(seen, config)  # G is asked once, with noise that the host draws
    with Transfers() as transfers:
        shown = known.anomaly_map(seen, config)
    assert shown.device.type == "meta" and shown.shape == (2, 1, 64, 64) and transfers.count == 0


def test_the_batch_size_changes_no_map(made):
    config, model, known = made
    batch = torch.from_numpy(images(4)).unsqueeze(1)
    together = known.anomaly_map(model.examine(batch), config)
    alone = [known.anomaly_map(model.examine(one), config) for one in batch.split(1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "shape, coarser", [((300, 500), False), ((200, 500), True), ((999, 99), True), ((256, 256), False)]
)
def test_a_file_with_fewer_pixels_than_any_normals_and_than_the_model_is_coarser(made, shape, coarser):
    config, _, known = made
    assert dataclasses.replace(known, file_sizes=[[300, 400], [900, 900]]).coarser(shape, config) == coarser


def test_the_plain_calibration_is_read_off_the_plain_maps():
    config = config_with("plain")
    model = tiny_normalizer(config.inference)
    known = calibrate(model, images(), config)
    x = torch.from_numpy(images()).unsqueeze(1)
    components = [abs(x - model(x)).mean().item(), abs(x - model.decode(model.encode(x))).mean().item()]
    assert [known.identity_error, known.vae_error] == pytest.approx(components, rel=1e-5)


def padded(config, shape):
    """The config where radiographs are padded, and the rows and columns that show a file of this shape."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, fit="pad", height=64, width=64))
    return config, content(shape, 64, 64, "pad")


def test_what_pad_added_says_nothing_of_normals(monkeypatch):
    """Thresholds, colours and errors are of radiographs, whatever lies beside them."""
    config, (rows, columns) = padded(config_with("plain"), (100, 300))
    model, shapes = tiny_normalizer(config.inference), [(100, 300)] * 8
    maps = torch.rand(8, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    beside = maps.clone()
    beside[..., rows, columns] = -1e6
    drawn = [iter((maps + 1e6 * (beside >= 0)).split(1)), iter(maps.split(1))]
    known = []
    for one in drawn:
        monkeypatch.setattr("survey.plain_map", lambda *given, one=one: torch.cat([next(one) for _ in given[0]]))
        known.append(calibrate(model, images(8), config, shapes=shapes))
    assert known[0].pixel_threshold == known[1].pixel_threshold < 1 and known[0].scale == known[1].scale
    inside = maps[..., rows, columns].numpy()
    assert known[0].pixel_threshold == threshold_from_normals(inside, config.inference.pixel_fpr)
    x = torch.from_numpy(images(8)).unsqueeze(1)
    error = abs(x - model(x))[..., rows, columns].mean().item()
    assert known[0].identity_error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "coarser"), [((30, 60), True), ((32, 64), False), ((64, 32), False), ((63, 20), True)]
)
def test_of_a_padded_file_no_more_is_wanted_than_its_own_place_shows(made, shape, coarser):
    config, _ = padded(made[0], shape)
    assert dataclasses.replace(made[2], file_sizes=[[300, 400], [900, 900]]).coarser(shape, config) == coarser


def test_another_setting_or_checkpoint_is_another_calibration(made):
    config, model, known = made
    assert known.belongs_to == shaping(model, config)
    other = dataclasses.replace(config, inference=dataclasses.replace(config.inference, noise_level=0.3))
    assert known.belongs_to != shaping(model, other)
    stranger = tiny_normalizer(config.inference)
    stranger.identity = {"vae_sha256": "a", "flow_sha256": "b"}
    assert known.belongs_to != shaping(stranger, config)


def test_there_is_nothing_to_load_before_anything_was_saved(tmp_path):
    assert Calibration.load(tmp_path, "plain") is None


@pytest.mark.parametrize("damage", ["arrays", "description", "threshold", "truncated"])
def test_a_damaged_calibration_is_refused_and_names_the_files_to_remove(damage, tmp_path):
    calibration([1.0, 2.0]).save(tmp_path)
    arrays, description = tmp_path / "plain.npz", tmp_path / "plain.json"
    if damage == "arrays":
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 1
        arrays.write_bytes(content)
    elif damage == "description":
        description.write_text(json.dumps({"format": FORMAT}))
    elif damage == "threshold":
        stored = json.loads(description.read_text())
        description.write_text(json.dumps(stored | {"pixel_threshold": stored["pixel_threshold"] + 0.1}))
    else:
        description.write_text(description.read_text()[:40])
    with pytest.raises(UsageError, match=r"plain.npz.*plain.json|plain.json.*plain.npz"):
        Calibration.load(tmp_path, "plain")


def test_a_calibration_of_an_earlier_version_is_made_anew(tmp_path):
    calibration([1.0, 2.0]).save(tmp_path)
    description = tmp_path / "plain.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"format": FORMAT - 1}))
    assert Calibration.load(tmp_path, "plain") is None


@pytest.mark.parametrize(("method", "count"), [("plain", 0), ("statistical", 1)])
def test_too_few_normals_are_refused(method, count):
    config = config_with(method)
    with pytest.raises(UsageError, match="too few validation normals"):
        calibrate(tiny_normalizer(config.inference), images(count), config)


def test_an_unknown_view_is_refused_before_anything_is_computed():
    config = config_with("statistical", views=("residual", "gaze"))
    with pytest.raises(UsageError, match="gaze is unknown"):
        calibrate(None, images(), config)


def test_an_image_unlike_all_normals_is_foreign_and_a_normal_is_not(tmp_path):
    config = config_with("plain")
    model = tiny_normalizer(config.inference)
    known = calibrate(model, images(24), config)
    known.save(tmp_path)
    loaded = Calibration.load(tmp_path, "plain")
    assert loaded.typical == known.typical
    batch = np.stack([images(25)[24], np.zeros((64, 64), np.float32)])
    seen = model.examine(torch.from_numpy(batch).unsqueeze(1))
    assert loaded.foreign(seen, 3.0) == [False, True] and loaded.foreign(seen, 8.0) == [False, False]


def test_few_normals_do_not_say_what_is_foreign():
    config = config_with("plain")
    model = tiny_normalizer(config.inference)
    known = calibrate(model, images(19), config)
    blank = torch.zeros(1, 1, 64, 64)
    assert known.typical is None and known.foreign(model.examine(blank), 3.0) == [False]
