"""Whether two radiographs are one picture: copies are, whatever was done to them, and patients are not."""

import csv
import stat
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pipeline import ROOT

from config import DataConfig
from dataset import TWINS, open_datasets, read_sample, report_twins
from phantoms import phantom
from radiographs.likeness import MOST, _differences, fingerprint, looks_like_one_of, twins
from radiographs.manifest import Record, list_records, split_records
from radiographs.reading import read_radiograph, rescale

BENCH = ROOT.parent / "shared" / "data" / "ufba_bench"


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Phantoms of twenty patients."""
    folder = tmp_path_factory.mktemp("patients")
    phantom.write_dataset(folder, train=16, val=4, test_normal=0, test_per_lesion=0, height=128, width=256, workers=1)
    return folder


def images_in(folder):
    records = list_records(folder)
    return np.stack([rescale(read_radiograph(record.path), 0.5, 99.5) for record in records])


def changed(image, how):
    if how == "exposed anew":
        return 2 * np.clip((image + 1) / 2, 0, 1) ** 1.3 - 1
    if how == "smaller":
        return cv2.resize(image, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)
    coded = cv2.imencode(".jpg", (127.5 * (image + 1)).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    return cv2.imdecode(coded, cv2.IMREAD_GRAYSCALE) / 127.5 - 1


@pytest.mark.parametrize("how", ["exposed anew", "smaller", "compressed"])
def test_a_copy_is_known_and_a_patient_is_not(how, patients):
    originals = images_in(patients)
    copies = np.stack([fingerprint(changed(image, how)) for image in originals])
    own = np.stack([fingerprint(image) for image in originals])
    assert list(twins(np.concatenate([own, copies]))) == [(number, len(own) + number) for number in range(len(own))]


@pytest.mark.parametrize("how", [lambda x: x[:, ::-1], lambda x: -x, lambda x: -x[:, ::-1]])
def test_a_copy_that_was_mirrored_or_inverted_is_known_too(how, patients):
    images = images_in(patients)
    own = np.stack([fingerprint(image) for image in images])
    assert looks_like_one_of(fingerprint(np.ascontiguousarray(how(images[3]))), own)
    assert not looks_like_one_of(fingerprint(np.ascontiguousarray(how(images[3]))), np.delete(own, 3, axis=0))


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_how_a_radiograph_is_fitted_does_not_change_what_it_looks_like(fit, patients):
    config = DataConfig(height=64, width=256, fit=fit, percentile_low=0.5, percentile_high=99.5)
    samples = [read_sample(record, config) for record in list_records(patients)]
    own = np.stack([fingerprint(image) for image in images_in(patients)])
    np.testing.assert_array_equal(np.stack([sample.fingerprint for sample in samples]), own)


@pytest.mark.skipif(not BENCH.is_dir(), reason="the radiographs are not here")
def test_real_patients_are_three_times_as_far_apart_as_copies_may_be():
    """238 panoramics of as many patients: the two most alike differ in more than 3 x 16 of 256 signs."""
    records = [record for record in list_records(BENCH) if record.split in ("train", "val")]
    prints = np.stack([fingerprint(read_radiograph(record.path).pixels) for record in records])
    apart = _differences(prints, prints)[~np.eye(len(prints), dtype=bool)]
    assert len(prints) == 238 and apart.min() > 3 * MOST and list(twins(prints)) == []
    everyone = range(len(prints))  # nor is one the mirror image or the negative of another
    assert not any(looks_like_one_of(prints[number], np.delete(prints, number, axis=0)) for number in everyone)


@pytest.mark.parametrize("counted", ["by numpy", "by a table"])
def test_pairs_are_found_however_many_are_compared_at_once(counted, monkeypatch):
    random = np.random.default_rng(0)
    ones = random.integers(0, 256, (40, 32), np.uint8)
    ones[35], ones[36], ones[37] = ones[3], ones[30], ones[31]
    ones[35, :2] ^= 0xFF  # 16 signs
    ones[36, :2] ^= 0xFF
    ones[36, 2] ^= 1  # one more
    assert MOST == 16
    if counted == "by a table":
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    for at_once in (1, 300, 2**22):
        monkeypatch.setattr("radiographs.likeness.AT_ONCE", at_once)
        assert list(twins(ones)) == [(3, 35), (31, 37)]
    assert list(twins(ones[:1])) == [] == list(twins(ones[:0]))
    assert list(twins(np.zeros_like(ones))) == [] == list(twins(np.full_like(ones, 255)))  # flat pictures


def test_one_picture_under_two_patients_is_told_and_named_locally(patients, tmp_path):
    records = list_records(patients)
    splits = split_records(records, DataConfig(root=str(patients), height=64, width=128))
    train, val = splits["train"][0], splits["val"][0]
    pixels = rescale(read_radiograph(train.path), 0.5, 99.5)
    copy = patients / "images" / "copy.png"
    Image.fromarray((127.5 * (changed(pixels, "smaller") + 1)).astype(np.uint8)).save(copy)
    doubled = {"train": splits["train"], "val": [*splits["val"], val.__class__(**{**vars(val), "path": copy})]}
    config, report = DataConfig(height=64, width=128), tmp_path / "skipped_local_only.csv"
    with pytest.warns(UserWarning, match="1 pairs of radiographs of different patients or splits look like one"):
        open_datasets(doubled, config, 0, report)
    with open(tmp_path / TWINS, newline="") as file:
        assert list(csv.reader(file))[1:] == [["train", train.path.name, "val", "copy.png"]]
    assert stat.S_IMODE((tmp_path / TWINS).stat().st_mode) == 0o600
    open_datasets(splits, config, 0, report)
    assert not (tmp_path / TWINS).exists()


def test_many_alike_of_one_patient_do_not_hide_one_of_two(tmp_path):
    """150 copies make 11,175 pairs that are nobody's business."""
    print_ = np.random.default_rng(0).integers(0, 256, 32, dtype=np.uint8)
    paths = [Path(f"{number}.png") for number in range(151)]
    train = [Record(path, "train", None, "", None, "A", "manifest") for path in paths[:-1]]
    val = [Record(paths[-1], "val", None, "", None, "B", "manifest")]
    with pytest.warns(UserWarning, match="150 pairs"):
        report_twins({"train": train, "val": val}, dict.fromkeys(paths, print_), tmp_path / TWINS)
