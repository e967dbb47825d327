"""The tuned backbone: what a step sees, how it learns, how it goes on, and its share in the reader's verdict."""

import dataclasses
import signal

import numpy as np
import pytest
import torch
from test_calibration import tiny_normalizer
from test_reader import config_for, normals, seen_by

import interruption
from backbone import PACKAGES
from calibration import calibrate, shaping
from checks import UsageError
from config import DataConfig, RuntimeConfig
from config_reading import ReaderConfig
from depthwise import Depthwise
from examination import kept_reader, ready_calibration
from features import with_backbone
from interruption import Interrupted
from reader import WHOLE, Reader, positions
from reader_training import READER, TUNED_LAST, UNSEEN_BY_TUNED, reader_identity, train_reader
from runtime import EMA
from tuned_backbone import TunedBackbone
from tuned_training import Lessons, fit_tuned, moved, turned

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def installed():
    for package in PACKAGES:
        pytest.importorskip(package)


def tuned_config(**changes):
    given = {"backbone": "efficientnet-lite0", "tuned_steps": 5, "crops": 4, "checkpoint_every": 2}
    return dataclasses.replace(config_for(**given | changes), data=DataConfig(num_workers=0))


def equal_weights(first, second):
    return all(torch.equal(weight, second.state_dict()[name]) for name, weight in first.state_dict().items())


def test_what_a_step_sees_follows_from_its_number_and_no_two_see_the_same():
    lessons, again = Lessons(normals(), tuned_config()), Lessons(normals(), tuned_config())
    crops, places, changed = lessons[3]
    assert crops.shape == changed.shape == (4, 1, 64, 64) and places.shape == (4, 2, 64, 64)
    assert all(torch.equal(one, other) for one, other in zip(lessons[3], again[3], strict=True))
    assert not torch.equal(lessons[4][0], crops)
    assert len({lessons[step][0].numpy().tobytes() for step in range(5)}) == 5


@pytest.mark.parametrize("half", [True, False])
def test_gradients_are_laid_out_as_the_weights_are(half):
    """AdamW in one kernel takes both in the order of memory: on a CPU it would scramble others without a word."""
    network = TunedBackbone().train()
    crops, places, _ = Lessons(normals(), tuned_config())[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = network.at_stride_two(crops, places).float().square().mean()
    loss.backward()
    learnt = [weight for weight in network.parameters() if weight.grad is not None]
    assert learnt and all(order(weight.grad) == order(weight) for weight in learnt)


def order(values):
    """How far apart neighbours lie in memory, along each dimension that has any."""
    return [apart for apart, size in zip(values.stride(), values.shape, strict=True) if size > 1]


def test_a_normal_is_moved_about_its_middle_and_no_further_than_is_said():
    image = np.zeros((101, 201), np.float32)
    image[50, 100] = 1.0
    dot = [np.argwhere(moved(image, 6.0, 0.15, np.random.default_rng(seed)) > 0.3) for seed in range(20)]
    assert all((abs(each - [50, 100]) <= 1).all() for each in dot)
    image = np.zeros((101, 201), np.float32)
    image[:, 95:106] = 1.0
    widths = [(moved(image, 6.0, 0.15, np.random.default_rng(seed))[50] > 0.5).sum() for seed in range(40)]
    assert 9 <= min(widths) < 11 < max(widths) <= 13


def test_a_mirrored_crop_says_where_it_lies_in_the_mirrored_radiograph():
    image = torch.arange(12.0).reshape(1, 2, 6)
    whole = torch.cat([image, image > 5, positions((2, 6), [WHOLE], "cpu")[0]])
    left = whole[..., :2]
    ways = [turned(left, np.random.default_rng(seed)) for seed in range(8)]
    mirror = torch.cat([whole[:2].flip(-1), whole[2:]])[..., -2:]  # the right end of the mirrored one
    assert all(torch.equal(way, left) or torch.equal(way, mirror) for way in ways)
    assert any(torch.equal(way, left) for way in ways) and any(torch.equal(way, mirror) for way in ways)


@pytest.mark.parametrize(("size", "stride", "height"), [(3, 1, 10), (3, 2, 17), (5, 1, 12), (5, 2, 18)])
def test_a_depthwise_convolution_has_the_gradients_that_torch_finds(size, stride, height):
    original = torch.nn.Conv2d(6, 6, size, stride, groups=6).double()
    ours = Depthwise(original, torch.nn.Identity())
    x = torch.randn(2, 6, height, height + 3, dtype=torch.double, requires_grad=True)
    expected, found = (
        torch.autograd.grad(layer(x).square().sum(), (x, original.weight, original.bias)) for layer in (original, ours)
    )
    torch.testing.assert_close(found, expected)


def test_images_of_any_size_get_a_logit_for_each_pixel():
    network = TunedBackbone()
    for size in ((64, 96), (50, 70)):
        places = positions(size, [WHOLE], "cpu").expand(2, -1, -1, -1)
        assert network(torch.zeros(2, 1, *size), places).shape == (2, 1, *size)


def test_it_learns_to_tell_what_does_not_belong(tmp_path):
    config = tuned_config(tuned_steps=30, lr_warmup_steps=5, fills=("saturate", "noise"), tuned_lr=1e-3)
    network = fit_tuned(normals(), config, {}, tmp_path / TUNED_LAST, DEVICE)
    image = torch.from_numpy(normals(7)[6].copy())
    image[40:60, 70:90] = 1.0
    with torch.no_grad():
        logits = network(image[None, None], positions((128, 128), [WHOLE], "cpu"))[0, 0]
    inside = torch.zeros(128, 128, dtype=bool)
    inside[40:60, 70:90] = True
    assert logits[inside].median() > logits[~inside].quantile(0.95)


def test_a_tuning_that_was_told_to_stop_ends_with_the_same_weights(tmp_path, monkeypatch):
    config, lesson = tuned_config(), Lessons.__getitem__
    whole = fit_tuned(normals(), config, {}, tmp_path / "whole.pt", DEVICE)

    def lesson_and_signal(self, step):
        if step == 2:
            interruption._on_signal(signal.SIGTERM, None)
        return lesson(self, step)

    interruption.running()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Lessons, "__getitem__", lesson_and_signal)
        fit_tuned(normals(), config, {}, tmp_path / TUNED_LAST, DEVICE)
    assert "goes on with the tuned backbone, step" in interruption.last_words(Interrupted(signal.SIGTERM))
    assert equal_weights(fit_tuned(normals(), config, {}, tmp_path / TUNED_LAST, DEVICE), whole)


def test_a_finished_tuning_of_the_same_settings_is_taken_and_of_others_made_anew(tmp_path, monkeypatch):
    config, last, asked = tuned_config(), tmp_path / TUNED_LAST, []
    first = fit_tuned(normals(), config, {"a": 1}, last, DEVICE)
    monkeypatch.setattr("tuned_training.learning_rate", lambda step, *rest: asked.append(step) or 1e-4)
    assert equal_weights(fit_tuned(normals(), config, {"a": 1}, last, DEVICE), first) and not asked
    fit_tuned(normals(), config, {"a": 2}, last, DEVICE)
    anew = dataclasses.replace(config, runtime=RuntimeConfig(resume=False))
    fit_tuned(normals(), anew, {"a": 2}, last, DEVICE)
    assert asked[::2] == [*range(5), *range(5)]


def test_a_tuning_that_diverges_says_so_and_leaves_nothing_to_go_on_from(tmp_path):
    with pytest.raises(UsageError, match="lower reader.tuned_lr"):
        fit_tuned(normals(), tuned_config(tuned_lr=1e30, lr_warmup_steps=0), {}, tmp_path / TUNED_LAST, DEVICE)
    assert not (tmp_path / TUNED_LAST).exists()


def test_the_reader_hears_both_in_their_shares_and_is_saved_with_both(tmp_path):
    config = tuned_config(steps=3, tuned_steps=3, tuned_share=0.25)
    model = tiny_normalizer(config.inference)
    reader, seen = train_reader(model, normals(), "p", config, tmp_path), seen_by(model)
    heads = dataclasses.replace(reader, tuned=None).logits(seen)
    with torch.no_grad():
        places = positions((128, 128), [WHOLE], "cpu").expand(2, -1, -1, -1)
        alone = reader.tuned.look(seen.detail, places, mirror=True)
    torch.testing.assert_close(reader.logits(seen), 0.75 * heads + 0.25 * alone)
    again = Reader.load(tmp_path / READER)
    torch.testing.assert_close(again.logits(seen), reader.logits(seen), rtol=0, atol=0)
    assert again.sha256 == reader.sha256 != dataclasses.replace(reader, tuned=None).sha256
    assert not (tmp_path / TUNED_LAST).exists()


def test_who_looks_at_the_mirror_image_too_says_the_same_of_either_side():
    network, image = TunedBackbone().eval(), torch.from_numpy(normals(1)[0])[None, None]
    places = positions((128, 128), [WHOLE], "cpu")
    with torch.no_grad():
        one, other = (network.look(x, places, mirror=True) for x in (image, image.flip(-1)))
        torch.testing.assert_close(one, other.flip(-1))
        torch.testing.assert_close(network.look(image, places, mirror=False), network(image, places))
        assert (network(image, places) - network(image.flip(-1), places).flip(-1)).abs().max() > 1e-3


def test_the_tuned_backbone_is_the_moving_average_of_its_steps(tmp_path, monkeypatch):
    """Against the average by its formula: the first weights as they are, then the decay rises from 2 / 11."""
    config, seen = tuned_config(tuned_steps=4), []
    update = EMA.update
    monkeypatch.setattr(
        EMA, "update", lambda self, network: seen.append(network.verdict.weight.clone()) or update(self, network)
    )
    averaged = fit_tuned(normals(), config, {}, tmp_path / TUNED_LAST, DEVICE).verdict.weight
    expected = seen[0]
    for number, weight in enumerate(seen[1:], 1):
        decay = (1 + number) / (10 + number)
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(averaged, expected)
    assert len(seen) == 4 and not torch.equal(averaged, seen[-1])


def test_a_reader_that_was_saved_before_it_looked_twice_looks_once(tmp_path):
    config = tuned_config(steps=1, tuned_steps=1)
    content = train_reader(tiny_normalizer(config.inference), normals(), "p", config, tmp_path).content()
    del content["settings"]["tuned_mirror"]
    assert not Reader.rebuild(content).settings.tuned_mirror


def test_a_calibration_of_a_reader_that_looks_once_is_called_as_ever(tmp_path):
    config = tuned_config(steps=1, tuned_steps=1)
    model = tiny_normalizer(config.inference)
    reader = train_reader(model, normals(), "p", config, tmp_path)
    once = dataclasses.replace(config, reader=dataclasses.replace(config.reader, tuned_mirror=False))
    assert set(shaping(model, config, reader)) - set(shaping(model, once, reader)) == {"reader_tuned_mirror"}


def test_whoever_reads_a_kept_reader_hears_its_tuned_backbone_as_is_asked_now(tmp_path):
    config = tuned_config(steps=1, tuned_steps=1)
    config = dataclasses.replace(config, inference=dataclasses.replace(config.inference, calibration=str(tmp_path)))
    model = tiny_normalizer(config.inference)
    train_reader(model, normals(), "p", config, tmp_path)
    changed = {"tuned_share": 0.9, "tuned_mirror": False}
    other = dataclasses.replace(config, reader=dataclasses.replace(config.reader, **changed))
    calibrate(model, np.stack(normals()), other, kept_reader(model, other)).save(tmp_path)
    settings = ready_calibration(model, other).reader.settings
    assert settings.tuned_share == 0.9 and not settings.tuned_mirror
    with pytest.raises(UsageError, match="no calibration of these"):
        ready_calibration(model, config)


def test_a_reader_of_another_g_keeps_the_backbone_that_never_saw_g(tmp_path, monkeypatch, capsys):
    config = tuned_config(steps=1, tuned_steps=2)
    model = tiny_normalizer(config.inference)
    model.identity = {"vae_sha256": "1", "flow_sha256": "2"}
    first, called = train_reader(model, normals(), "p", config, tmp_path), []
    monkeypatch.setattr("reader_training.fit_tuned", lambda *given: called.append(1) or fit_tuned(*given))
    model.identity = {"vae_sha256": "1", "flow_sha256": "3"}
    fewer = dataclasses.replace(config, reader=dataclasses.replace(config.reader, features=("image",), steps=2))
    second = train_reader(model, normals(), "p", fewer, tmp_path)
    assert not called and equal_weights(first.tuned, second.tuned) and "learnt the same" in capsys.readouterr().out
    assert second.belongs_to["flow_sha256"] == "3" and Reader.load(tmp_path / READER).sha256 == second.sha256
    for number, change in enumerate(({"tuned_lr": 1e-5}, {"fills": ("level",)}, {"crops": 2}), 1):
        other = dataclasses.replace(config, reader=dataclasses.replace(config.reader, **change))
        train_reader(model, normals(), "p", other, tmp_path)
        assert len(called) == number
    train_reader(model, normals(), "other radiographs", other, tmp_path)
    anew = dataclasses.replace(other, runtime=dataclasses.replace(other.runtime, resume=False))
    train_reader(model, normals(), "other radiographs", anew, tmp_path)
    assert len(called) == 5


def test_what_the_tuned_backbone_does_not_hear_of_is_named_as_an_identity_names_it():
    config = tuned_config()
    model = tiny_normalizer(config.inference)
    model.identity = {"vae_sha256": "1", "flow_sha256": "2"}
    assert set(UNSEEN_BY_TUNED) <= set(reader_identity(model, config, "p"))


def test_without_a_backbone_nothing_is_tuned():
    assert with_backbone(ReaderConfig(backbone="none")).tuned_steps == 0
    assert with_backbone(ReaderConfig(backbone="none", tuned_lr=0.1)) == with_backbone(ReaderConfig(backbone="none"))
    alone = with_backbone(ReaderConfig(features=("image",), backbone="efficientnet-lite0"))
    assert alone.tuned_steps > 0 and alone.backbone == "efficientnet-lite0"
    assert with_backbone(ReaderConfig(features=("image",), tuned_steps=0)).backbone == "none"
