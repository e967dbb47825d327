"""Phase 1 for less: squares instead of whole images, and an end where nothing is gained any more."""

import math
from types import SimpleNamespace

import pytest
import torch

import train_vae
from checks import UsageError
from config import Config, DataConfig, VAEConfig
from files import load_checkpoint
from model import ssim
from radiographs.geometry import content
from run_log import read_log
from train_vae import random_crops

ALONE = SimpleNamespace(num_processes=1, process_index=0)


def numbered(images, height, width):
    """Images whose every pixel says where it is."""
    return torch.arange(images * height * width, dtype=torch.float32).reshape(images, 1, height, width)


def cropping(side, seed=0):
    config = Config(vae=VAEConfig(crop=side))
    return SimpleNamespace(vae=config.vae, runtime=SimpleNamespace(seed=seed))


# ---------------------------------------------------------------- squares


def test_a_crop_is_a_square_of_its_own_image_at_any_place():
    x, corners = numbered(3, 40, 64), set()
    for step in range(60):
        for number, square in enumerate(random_crops(x, cropping(32), step, ALONE)):
            image, place = divmod(int(square[0, 0, 0]), 40 * 64)
            top, left = divmod(place, 64)
            assert image == number and torch.equal(square, x[image, :, top : top + 32, left : left + 32])
            corners.add((top, left))
    rows, columns = zip(*corners, strict=True)
    assert (min(rows), max(rows), min(columns), max(columns)) == (0, 8, 0, 32)


def test_crops_follow_from_seed_and_step_and_are_shared_by_processes():
    x = numbered(4, 40, 64)
    whole = random_crops(x, cropping(16), 7, ALONE)
    ranks = [SimpleNamespace(num_processes=2, process_index=rank) for rank in range(2)]
    parts = [random_crops(x[2 * rank.process_index :][:2], cropping(16), 7, rank) for rank in ranks]
    assert torch.equal(torch.cat(parts), whole)
    for other in (random_crops(x, cropping(16), 8, ALONE), random_crops(x, cropping(16, seed=1), 7, ALONE)):
        assert not torch.equal(other, whole)


def test_without_a_crop_the_images_stay_whole():
    x = numbered(2, 16, 16)
    assert random_crops(x, cropping(0), 1, ALONE) is x


@pytest.mark.parametrize("crop", [12, -8])
def test_a_crop_that_no_latent_fits_is_refused(crop):
    with pytest.raises(UsageError, match="vae.crop must be"):
        VAEConfig(crop=crop)


def test_a_side_that_is_no_longer_than_the_crop_stays_whole():
    x = torch.arange(2 * 16 * 48.0).reshape(2, 1, 16, 48)
    part = random_crops(x, cropping(24), 3, ALONE)
    left = int(part[0, 0, 0, 0])
    assert part.shape == (2, 1, 16, 24) and torch.equal(part[0], x[0, :, :, left : left + 24])
    assert random_crops(x, cropping(64), 3, ALONE).equal(x)


def test_phase_1_trains_on_squares_and_validates_whole_images(call, tmp_path, monkeypatch):
    seen, real = {True: set(), False: set()}, train_vae.vae_loss

    def loss(x, *others):
        seen[torch.is_grad_enabled()].add(tuple(x.shape[2:]))
        return real(x, *others)

    monkeypatch.setattr(train_vae, "vae_loss", loss)
    assert call("train_vae", "--vae.crop", 32).code == 0
    assert seen == {True: {(32, 32)}, False: {(64, 128)}}
    refused = call("train_vae", "--vae.crop", 40)
    assert refused.code == 2 and "vae.crop was 32, now 40" in refused.error


def test_whole_images_and_every_patience_are_the_run_that_earlier_versions_knew(made):
    last = load_checkpoint(made.phase1 / "checkpoint_last.pt", "vae-training", "")
    assert not {"crop", "patience"} & set(last["identity"]["settings"]["vae"])


# ---------------------------------------------------------------- patience


LOSSES = {0: 5.0, 1: 4.0, 2: 4.5, 3: 4.0, 4: 3.0, 5: 2.0, 6: 1.0}  # at each step
EACH = ["--vae.validate-every", 1, "--runtime.checkpoint-every", 1, "--vae.log-every", 99]


@pytest.fixture
def scripted(monkeypatch):
    """Validation says what LOSSES say, and at a step that is asked for the run is interrupted."""
    asked = SimpleNamespace(stop=None)

    def validate(vae, validation, config, device, step, waiting):
        if step == asked.stop:
            raise KeyboardInterrupt
        return {"loss": LOSSES[step], "psnr": 1.0, "ssim": 1.0}

    monkeypatch.setattr(train_vae, "validate", validate)
    return asked


def kept(folder, name="best", kind="vae"):
    return load_checkpoint(folder / f"phase1_vae/checkpoint_{name}.pt", kind, "")


def test_a_run_ends_after_so_many_validations_without_a_gain_and_says_why(scripted, call, tmp_path):
    result = call("train_vae", *EACH, "--vae.patience", 2)
    assert result.code == 0 and "ended at step 3 of 6: 2 validations without a lower loss" in result.out
    assert kept(tmp_path)["step"] == 1 and kept(tmp_path, "last", "vae-training")["step"] == 3
    log = read_log(tmp_path / "phase1_vae")
    assert log["validations_without_gain"] == ([3], [2.0]) and log["train/loss"][0] == [1, 2, 3]


def test_the_count_lives_in_the_checkpoint(scripted, call, tmp_path):
    scripted.stop = 3
    assert call("train_vae", *EACH, "--vae.patience", 2).code == 130
    assert kept(tmp_path, "last", "vae-training")["validations_without_gain"] == 1
    scripted.stop = None
    assert "ended at step 3 of 6" in call("train_vae", *EACH, "--vae.patience", 2).out


def test_a_run_that_ended_has_ended_and_goes_on_with_more_patience(scripted, call, tmp_path):
    assert call("train_vae", *EACH, "--vae.patience", 2).code == 0
    again = call("train_vae", *EACH, "--vae.patience", 2)
    assert "ended at step 3 of 6" in again.out and kept(tmp_path, "last", "vae-training")["step"] == 3
    longer = call("train_vae", *EACH, "--vae.patience", 3)
    assert longer.code == 0 and "ended at" not in longer.out and kept(tmp_path)["step"] == 6


def test_without_patience_all_steps_are_taken(scripted, call, tmp_path):
    assert call("train_vae", *EACH).code == 0
    assert kept(tmp_path)["step"] == 6


@pytest.mark.parametrize("shape", [(100, 300), (300, 100)])
def test_the_quality_of_a_padded_copy_is_that_of_the_radiograph(shape):
    """A black border is copied without a fault, and would lift a poor copy by decibels."""
    config = Config(data=DataConfig(fit="pad", height=64, width=64))
    rows, columns = content(shape, 64, 64, "pad")
    x, copy = torch.full((2, 1, 64, 64), -1.0), torch.full((2, 1, 64, 64), -1.0)
    x[..., rows, columns] = torch.rand(2, 1, *x[0, 0, rows, columns].shape)
    copy[..., rows, columns] = x[..., rows, columns] + 0.1
    found = train_vae.quality_of(x, copy, [shape, shape], config)
    assert float(found["psnr"]) == pytest.approx(20 * math.log10(2 / 0.1), abs=1e-3)
    assert float(found["ssim"]) < float(ssim(x, copy))
    whole = train_vae.quality_of(x, copy, [shape, shape], Config())
    assert float(whole["psnr"]) == pytest.approx(float(found["psnr"]) + 10 * math.log10(3), abs=0.1)


def test_a_line_of_pixels_ends_no_training():
    config = Config(data=DataConfig(fit="pad", height=64, width=64))
    x = torch.rand(2, 1, 64, 64)
    copy = x * torch.tensor([0.9, 0.1])[:, None, None, None]
    found = train_vae.quality_of(x, copy, [(10, 300), (64, 64)], config)  # of the first two rows are left
    alone = [float(ssim(x[i : i + 1], copy[i : i + 1])) for i in range(2)]  # of the first the frame is compared
    assert math.isfinite(float(found["psnr"])) and float(found["ssim"]) == pytest.approx(sum(alone) / 2, abs=1e-5)
