"""Synthetic radiographs: reproducible, lesions confined to their masks, files that other programs read."""

import csv
import subprocess
import sys
import time

import numpy as np
import psutil
import pydicom
import pytest
from PIL import Image
from pipeline import ROOT
from scipy.ndimage import binary_dilation

from checks import UsageError
from phantoms.detector import draw_grain
from phantoms.patient import sample_patient
from phantoms.phantom import LESIONS, draw_phantom, write_dataset, write_dicom

SIZE = {"height": 128, "width": 256}
COUNTS = {"train": 2, "val": 1, "test_normal": 1, "test_per_lesion": 2}
# Plausible mask areas in pixels at 128 x 256: caries are millimetres, cysts and bone loss centimetres.
AREA = {
    "caries": (5, 120),
    "periapical": (20, 200),
    "cyst": (150, 1500),
    "impacted": (60, 900),
    "implant": (40, 700),
    "bone_loss": (60, 900),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("phantom"), **COUNTS, **SIZE, workers=1)


def read(manifest):
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("lesion", [None, *LESIONS])
def test_a_phantom_follows_from_seed_and_patient(lesion):
    first, second = (draw_phantom(5, 2, lesion, **SIZE) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes() and first.mask.tobytes() == second.mask.tobytes()


def test_another_seed_or_patient_is_another_picture():
    picture = draw_phantom(5, 2, **SIZE).image
    for other in (draw_phantom(6, 2, **SIZE), draw_phantom(5, 3, **SIZE)):
        assert np.abs(picture - other.image).mean() > 0.01


@pytest.mark.parametrize("shape", [(96, 96), (128, 256), (100, 330)])
def test_pictures_have_the_asked_size_and_use_the_grey_scale(shape):
    phantom = draw_phantom(0, 0, None, *shape)
    assert (
        phantom.image.shape == phantom.mask.shape == shape
        and phantom.image.dtype == np.float32
        and phantom.mask.dtype == bool
    )
    assert 0 <= phantom.image.min() and phantom.image.max() <= 1 and phantom.image.std() > 0.08


@pytest.mark.parametrize("lesion", LESIONS)
def test_a_lesion_changes_nothing_outside_its_mask(lesion):
    for patient in range(4):
        sick, healthy = draw_phantom(1, patient, lesion, **SIZE), draw_phantom(1, patient, None, **SIZE)
        change = np.abs(sick.image - healthy.image)
        assert change[~sick.mask].max() < 0.03  # the mask threshold of 0.02, and its share of the noise
        assert change[~binary_dilation(sick.mask, iterations=6)].max() < 1e-4


@pytest.mark.parametrize("lesion", LESIONS)
def test_every_lesion_has_a_mask_of_plausible_size(lesion):
    low, high = AREA[lesion]
    for patient in range(12):
        assert low <= draw_phantom(3, patient, lesion, **SIZE).mask.sum() <= high


def test_a_normal_has_an_empty_mask():
    assert not draw_phantom(0, 0, **SIZE).mask.any()


def test_implants_are_bright_and_cysts_dark():
    for lesion, sign in (("implant", 1), ("cyst", -1)):
        sick, healthy = draw_phantom(0, 0, lesion, **SIZE), draw_phantom(0, 0, **SIZE)
        assert sign * (sick.image - healthy.image)[sick.mask].mean() > 0.05


@pytest.mark.parametrize("lesion", LESIONS)
def test_every_lesion_can_be_seen(lesion):
    for patient in range(12):
        sick, healthy = draw_phantom(3, patient, lesion, **SIZE), draw_phantom(3, patient, None, **SIZE)
        contrast = np.abs(sick.image - healthy.image)[sick.mask].mean()
        assert contrast > 0.05  # a dozen grey levels of 256, several times the noise


def correlation(picture, rows, columns):
    """Of a picture with itself, shifted."""
    height, width = picture.shape
    ahead = picture[rows:, columns:]
    behind = picture[: height - rows, : width - columns]
    return np.corrcoef(ahead.ravel(), behind.ravel())[0, 1]


def flat_noise(attenuation):
    """The noise over an even attenuation."""
    flat = np.full((400, 400), attenuation, np.float32)
    return draw_grain(flat, {"noise": 0.01}, np.random.default_rng(0)) - flat


def test_neighbouring_pixels_share_their_grain_and_distant_ones_only_a_column():
    grain = flat_noise(0.5)
    assert correlation(grain, 1, 0) > 0.3 and correlation(grain, 0, 1) > 0.3
    assert abs(correlation(grain, 0, 9)) < 0.02
    assert grain.mean(0).std() > 1.2 * grain.mean(1).std()


def test_grain_grows_as_the_root_of_the_lost_photons():
    np.testing.assert_allclose(flat_noise(1.2).std() / flat_noise(0.2).std(), np.exp(0.5), rtol=1e-3)


def test_a_row_of_teeth_is_no_comb():
    for seed in range(12):
        teeth = sample_patient(np.random.default_rng(seed)).teeth
        rows = [
            [t for t in teeth if t.upper is upper and t.x * side > 0] for upper in (True, False) for side in (-1, 1)
        ]
        turns = np.concatenate([np.diff([t.angle for t in row]) for row in rows])
        lengths = np.concatenate([np.diff([t.crown + t.root for t in row]) for row in rows])
        assert np.abs(turns).mean() > 0.04 and np.abs(lengths).mean() > 0.01


def test_teeth_lean_into_a_gap():
    leans = {True: [], False: []}
    for seed in range(150):
        patient = sample_patient(np.random.default_rng(seed))
        lost = {(t.upper, t.x > 0, t.position) for t in patient.missing}
        for tooth in patient.teeth:
            if 4 <= tooth.position <= 7:
                beside = (tooth.upper, tooth.x > 0, tooth.position - 1) in lost
                leans[beside].append(tooth.angle * np.sign(tooth.x))
    assert np.mean(leans[True]) > np.mean(leans[False]) + 0.05


def test_the_spine_veils_the_middle_below_the_teeth():
    mean = np.mean([draw_phantom(0, patient, None, **SIZE).image for patient in range(16)], axis=0)
    below = mean[100:115]
    beside = np.concatenate([below[:, 78:90], below[:, 166:178]], axis=1)
    assert below[:, 120:136].mean() > beside.mean() + 0.03


def test_below_the_jaw_it_is_dark_and_the_skull_base_is_bright():
    mean = np.mean([draw_phantom(0, patient, None, **SIZE).image for patient in range(16)], axis=0)
    sides = np.concatenate([mean[:, :24], mean[:, -24:]], axis=1)
    assert sides[-12:].mean() < 0.7 * mean.mean() < mean.mean() < sides[:12].mean()


def test_an_unknown_lesion_is_refused_by_name():
    with pytest.raises(UsageError, match="caries"):
        draw_phantom(0, 0, "toothache", **SIZE)


def test_dicom_reads_back_as_the_same_panoramic_picture(tmp_path):
    phantom = draw_phantom(0, 7, "cyst", **SIZE)
    write_dicom(tmp_path / "x.dcm", phantom)
    data = pydicom.dcmread(tmp_path / "x.dcm")
    assert (data.Modality, data.BitsAllocated, data.PhotometricInterpretation, str(data.PatientName)) == (
        "PX",
        16,
        "MONOCHROME2",
        "PHANTOM^0007",
    )
    assert (
        data.file_meta.MediaStorageSOPInstanceUID == data.SOPInstanceUID
        and data.SOPClassUID.name == "Digital X-Ray Image Storage - For Presentation"
    )
    np.testing.assert_allclose(data.pixel_array / 4095, phantom.image, atol=0.5 / 4095 + 1e-6)


def test_no_patient_lies_in_two_splits(dataset):
    patients = {
        split: {row["patient"] for row in read(dataset) if row["split"] == split} for split in ("train", "val", "test")
    }
    assert not patients["train"] & patients["val"] and not (patients["train"] | patients["val"]) & patients["test"]


def test_the_manifest_lists_what_was_asked_for(dataset):
    rows = read(dataset)
    assert list(rows[0]) == ["image", "split", "label", "kind", "mask", "patient"]
    assert [sum(row["split"] == split for row in rows) for split in ("train", "val", "test")] == [
        2,
        1,
        1 + 2 * len(LESIONS),
    ]
    assert all(row["kind"] == "normal" for row in rows if row["split"] != "test")
    for row in rows:
        assert (dataset.parent / row["image"]).is_file() and (row["kind"] != "normal") == (row["label"] == "1") == bool(
            row["mask"]
        )


def test_masks_are_black_and_white_and_as_large_as_their_image(dataset):
    for row in read(dataset):
        if row["mask"]:
            with Image.open(dataset.parent / row["mask"]) as mask:
                assert mask.size == (256, 128) and set(np.unique(np.asarray(mask))) == {0, 255}


def test_writing_twice_gives_the_same_bytes(dataset, tmp_path):
    again = write_dataset(tmp_path, **COUNTS, **SIZE, workers=2)
    for file in sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.*")):
        assert (tmp_path / file).read_bytes() == (dataset.parent / file).read_bytes(), file
    assert again.read_bytes() == dataset.read_bytes()


def test_png_holds_the_same_picture_in_eight_bits(tmp_path):
    manifest = write_dataset(
        tmp_path, train=1, val=0, test_normal=0, test_per_lesion=0, **SIZE, file_format="png", workers=1
    )
    with Image.open(tmp_path / read(manifest)[0]["image"]) as image:
        pixels = np.asarray(image)
    np.testing.assert_allclose(pixels / 255, draw_phantom(0, 0, **SIZE).image, atol=0.5 / 255 + 1e-6)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match="taken is a file"):
        write_dataset(tmp_path / "taken", **COUNTS)


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"workers": -1}, {"height": 0}, {"width": -5}])
def test_sizes_and_workers_below_one_are_refused(wrong, tmp_path):
    with pytest.raises(UsageError, match="at least 1"):
        write_dataset(tmp_path / "new", 1, 0, 0, 0, **wrong)


def test_an_old_manifest_does_not_outlive_the_pictures_it_lists(tmp_path, monkeypatch):
    (tmp_path / "manifest.csv").write_text("image\nold.png\n")
    monkeypatch.setattr("phantoms.phantom.ProcessPoolExecutor", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        write_dataset(tmp_path, 1, 0, 0, 0)
    assert not (tmp_path / "manifest.csv").exists()


def test_processes_that_draw_end_with_the_one_that_was_killed(tmp_path):
    command = [sys.executable, "-m", "phantoms.phantom", "--out", str(tmp_path), "--train", "2000", "--workers", "2"]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any((tmp_path / "images").glob("*")) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    drawing = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    assert len(drawing) >= 2 and not psutil.wait_procs(drawing, timeout=60)[1]
