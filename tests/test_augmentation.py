"""Augmentation: on the host what albumentations makes of the numbers; on a device the same, a batch at a time."""

import dataclasses
import pickle
from pathlib import Path
from types import SimpleNamespace

import albumentations
import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, default_collate

from augmentation import images_of, masks_of, moved, normalized, on_device, shaping
from config import WHEREABOUTS, DataConfig
from dataset import RadiographDataset
from files import load_checkpoint
from phantoms.phantom import draw_phantom
from radiographs.manifest import Record
from runtime import plain, without
from shelf import Sample

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # the second only by name
HEIGHT, WIDTH = 256, 512
CONFIG = DataConfig(height=HEIGHT, width=WIDTH, flip=True)
GREY_LEVELS = dict.fromkeys(("brightness", "contrast", "gamma", "noise_std"), 0)
MOTION_ALONE = dataclasses.replace(CONFIG, **GREY_LEVELS)
KEYS = [(epoch, index) for epoch in range(8) for index in range(3)]
OPENCV_4 = int(cv2.__version__.split(".")[0]) < 5  # it reads at the nearest 1/32 of a pixel
NAMES = ("a smooth image", "a phantom", "white noise")
OFF_EXACT = (1e-5, 3e-5, 2e-4)  # what a batch is off exact arithmetic at most, in units of [-1, 1]
OFF_HOST = (0.003, 0.012, 0.065) if OPENCV_4 else (1e-5, 3e-5, 2e-4)  # and off the host

each_picture = pytest.mark.parametrize("picture", range(3), ids=NAMES)


@pytest.fixture(scope="module")
def pictures():
    """A smooth image, a phantom and white noise, and the lesion of the phantom as the mask of each."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    phantom = draw_phantom(0, 1, "cyst", HEIGHT, WIDTH)
    noise = np.random.default_rng(5).uniform(-1, 1, (HEIGHT, WIDTH))
    images = (np.sin(x / 10) * np.cos(y / 8), 2 * phantom.image - 1, noise)
    return [(image.astype(np.float32), phantom.mask) for image in images]


def dataset_of(pairs, config=CONFIG, seed=7, masked=True):
    """A dataset in memory."""
    records = [Record(Path(f"{n}.png"), "train", 0, "normal", None, str(n), "file") for n in range(len(pairs))]
    known = [(record.path, pair) for record, pair in zip(records, pairs, strict=True)]
    samples = {path: Sample(image, mask if masked else None, image.shape, "", None) for path, (image, mask) in known}
    return RadiographDataset(records, config, seed, ["" for _ in pairs], [], samples)


def by_albumentations(image, mask, config, key):
    """What augmentation was before a device could do it, written down again."""
    shift, scale, turn = config.shift_share, config.scale_share, config.rotate_degrees
    ranges = {"scale": (1 - scale, 1 + scale), "translate_percent": (-shift, shift), "rotate": (-turn, turn)}
    move = albumentations.Affine(**ranges, keep_ratio=True, border_mode=cv2.BORDER_REPLICATE, p=1)
    random = np.random.default_rng(key)
    pipeline = albumentations.Compose([albumentations.HorizontalFlip(p=0.5 if config.flip else 0), move])
    pipeline.set_random_seed(int(random.integers(2**31)))
    both = pipeline(image=image[..., None], mask=mask)
    x = random.uniform(1 - config.contrast, 1 + config.contrast) * both["image"][..., 0]
    x = x + random.uniform(-config.brightness, config.brightness)
    x = 2 * np.clip((x + 1) / 2, 0, 1) ** random.uniform(1 - config.gamma, 1 + config.gamma) - 1
    x = x + random.uniform(0, config.noise_std) * random.standard_normal(x.shape, np.float32)
    return SimpleNamespace(image=np.clip(x, -1, 1).astype(np.float32), mask=both["mask"], pipeline=pipeline)


def both_ways(pairs, config, keys=KEYS):
    """The same keys augmented on the host, and as a batch."""
    dataset = dataset_of(pairs, config)
    host, batched = (default_collate([dataset.augmented(there)[key] for key in keys]) for there in (False, True))
    return host, batched


def exactly(image, config, key):
    """The image moved in float64: SciPy, at the places where albumentations says that it took pixels from."""
    pipeline = by_albumentations(image, image, config, key).pipeline
    inverse = np.linalg.inv(pipeline.transforms[1].get_applied_params()["matrix"])
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
    places = [row[0] * x + row[1] * y + row[2] for row in (inverse[1], inverse[0])]
    before = image[:, ::-1] if pipeline.transforms[0].get_applied_params() else image
    return map_coordinates(before.astype(np.float64), places, order=1, mode="nearest")


class Operations(TorchDispatchMode):
    """Which operations torch is asked for."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------- on the host


@each_picture
@pytest.mark.parametrize("flip", [False, True])
def test_a_host_computes_to_the_bit_what_albumentations_computes(pictures, picture, flip):
    image, mask = pictures[picture]
    config = dataclasses.replace(CONFIG, flip=flip)
    dataset = dataset_of([(image, mask)], config).augmented()
    for epoch in range(8):
        found = dataset[epoch, 0]
        expected = by_albumentations(image, mask.astype(np.uint8), config, (7, epoch, 0))
        assert found["image"].numpy()[0].tobytes() == expected.image.tobytes()
        assert np.array_equal(found["mask"][0], expected.mask) and "numbers" not in found


# ---------------------------------------------------------------- batches


@each_picture
def test_a_batch_is_off_exact_arithmetic_by_rounding_alone(pictures, picture):
    image, _ = pictures[picture]
    _, batch = both_ways([pictures[picture]], MOTION_ALONE, keys=[(epoch, 0) for epoch in range(12)])
    exact = np.stack([exactly(image, MOTION_ALONE, (7, epoch, 0)) for epoch in range(12)])
    assert np.abs(images_of(batch, CPU)[:, 0].numpy() - exact).max() < OFF_EXACT[picture]


@each_picture
def test_a_batch_is_what_the_host_makes_of_its_images(pictures, picture):
    host, batch = both_ways(pictures, CONFIG)
    mine = batch["index"] == picture
    difference = (images_of(batch, CPU) - host["image"])[mine].abs()
    assert difference.max() < OFF_HOST[picture] and difference.mean() < OFF_HOST[picture] / 5
    plain_ones = (batch["image"] - host["image"])[mine].abs()
    assert plain_ones.mean() > 0.05  # it was something to do


def test_masks_of_a_batch_are_those_of_the_host(pictures):
    host, batch = both_ways(pictures, CONFIG)
    masks = masks_of(batch, CPU)
    assert masks.dtype == torch.uint8 and masks.shape == host["mask"].shape and set(masks.unique().tolist()) == {0, 1}
    differ = (masks != host["mask"]).sum((1, 2, 3))
    assert differ.max() <= 0.005 * host["mask"].sum((1, 2, 3)).min()  # pixels halfway between two
    assert (batch["mask"] != host["mask"]).sum() > 0.1 * host["mask"].sum()


def test_an_image_without_a_mask_has_none_after_it_moved(pictures):
    dataset = dataset_of(pictures, masked=False).augmented(on_device=True)
    batch = default_collate([dataset[key] for key in KEYS])
    assert not batch["has_mask"].any() and not masks_of(batch, CPU).any()


def test_half_of_the_images_are_mirrored_where_that_is_asked_for(pictures):
    nothing_else = dict.fromkeys(("rotate_degrees", "shift_share", "scale_share"), 0)
    config, image = dataclasses.replace(MOTION_ALONE, **nothing_else), pictures[2][0]
    _, batch = both_ways([pictures[2]], config, keys=[(epoch, 0) for epoch in range(100)])
    found, ways = images_of(batch, CPU)[:, 0], [torch.from_numpy(x.copy()) for x in (image, image[:, ::-1])]
    plain_ones, mirrored = (((found - way).abs().amax((1, 2)) < 2e-4).sum() for way in ways)
    assert plain_ones + mirrored == 100 and 30 < mirrored < 70


def test_a_whole_pixel_of_shift_moves_pixels_and_repeats_the_edge():
    x = torch.rand(1, 1, 6, 8)
    to_the_left = np.array([[1, 0, 3], [0, 1, 0], [0, 0, 1]])
    source = torch.tensor(normalized(to_the_left, (6, 8))[:2], dtype=torch.float32)[None]
    expected = torch.cat([x[..., 3:], x[..., -1:].expand(-1, -1, -1, 3)], -1)
    torch.testing.assert_close(moved(x, source, "bilinear"), expected, atol=1e-6, rtol=0)


def test_an_image_does_not_depend_on_its_batch(pictures):
    """So neither on how many processes share a batch."""
    dataset = dataset_of(pictures).augmented(on_device=True)
    whole, *parts = (default_collate([dataset[key] for key in keys]) for keys in (KEYS, KEYS[:5], KEYS[5:]))
    together = torch.cat([images_of(part, CPU) for part in parts])
    assert torch.equal(images_of(whole, CPU), together)


def test_a_batch_takes_no_product_of_matrices_and_stops_no_device(pictures):
    """TF32, in which a GPU that trains multiplies matrices, would put a pixel up to half a pixel elsewhere."""
    _, batch = both_ways(pictures, CONFIG)
    with Operations() as operations:
        images_of(batch, CPU), masks_of(batch, CPU)
    assert "grid_sampler_2d" in operations.names
    assert not {"mm", "bmm", "addmm", "baddbmm", "_local_scalar_dense", "nonzero"} & operations.names


@pytest.mark.parametrize("workers", [0, 2])
def test_numbers_travel_through_the_loader(pictures, workers):
    dataset = dataset_of(pictures).augmented(on_device=True)
    loader = DataLoader(dataset, batch_size=2, sampler=[(1, 2), (4, 0)], num_workers=workers)
    (batch,) = loader
    assert batch["numbers"].source.shape == (2, 2, 3) and batch["numbers"].noise.shape == (2, 1, HEIGHT, WIDTH)
    assert torch.equal(images_of(batch, CPU)[1:], images_of(default_collate([dataset[4, 0]]), CPU))
    again = pickle.loads(pickle.dumps(dataset))[4, 0]
    assert torch.equal(again["numbers"].noise, batch["numbers"].noise[1])


def test_images_that_bring_no_numbers_stay_as_they_are(pictures):
    batch = default_collate([dataset_of(pictures)[0]])
    assert torch.equal(images_of(batch, CPU), batch["image"]) and torch.equal(masks_of(batch, CPU), batch["mask"])


# ---------------------------------------------------------------- the setting


@pytest.mark.parametrize(
    ("setting", "where"), [("auto", (False, True)), ("host", (False,) * 2), ("device", (True,) * 2)]
)
def test_a_gpu_augments_unless_it_is_told_otherwise(setting, where):
    config = dataclasses.replace(CONFIG, augment_on=setting)
    assert tuple(on_device(config, device) for device in (CPU, GPU)) == where


def test_a_run_on_a_host_is_known_by_what_it_was_known_by_before_there_was_a_choice():
    before = without(plain(CONFIG), *WHEREABOUTS, "augment_on")
    assert shaping(CONFIG, CPU) == before == shaping(dataclasses.replace(CONFIG, augment_on="host"), GPU)
    assert shaping(CONFIG, GPU) == {**before, "augment_on": "device"}


@pytest.mark.parametrize("flags", [[], ["--vae.crop", 32]])
def test_phase_1_learns_the_same_either_way(flags, call, tmp_path):
    trained = {}
    for place in ("host", "device"):
        assert call("train_vae", "--data.augment-on", place, *flags, outputs=tmp_path / place).code == 0
        kept = load_checkpoint(tmp_path / place / "phase1_vae/checkpoint_last.pt", "vae-training", "")
        trained[place] = kept["weights"]
    for host, device in zip(*(weights.values() for weights in trained.values()), strict=True):
        torch.testing.assert_close(device, host, atol=1e-3, rtol=0)
    assert any(not torch.equal(*pair) for pair in zip(*(w.values() for w in trained.values()), strict=True))


def test_phase_2_encodes_the_same_either_way(call, tmp_path):
    latents = {}
    for place in ("host", "device"):
        assert call("extract_latents", "--data.augment-on", place, outputs=tmp_path / place).code == 0
        latents[place] = np.load(tmp_path / place / "phase2_latents/latents_train.npy")
    close = np.abs(latents["device"] - latents["host"]).max()
    assert 0 < close < (0.1 if OPENCV_4 else 1e-3)
