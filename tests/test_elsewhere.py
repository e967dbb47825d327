"""Radiographs of another machine: the copy that imitates one, and a reader that is taken there."""

import shutil
import sys

import numpy as np
import pytest
from pipeline import ROOT, run_benchmark

sys.path.insert(0, str(ROOT / "benchmarks"))
import elsewhere

from checks import UsageError
from phantoms import phantom
from radiographs.manifest import list_records
from radiographs.reading import read_mask, read_radiograph

READER = (
    "--inference.method reader --reader.features image latent --reader.steps 4 --reader.copies 1 --reader.width 8 "
    "--reader.tuned-steps 2"
).split()


@pytest.fixture
def study(tmp_path):
    """Phantoms of 8 bits: one that trained, two that validated, a normal and one of each lesion that test."""
    size = {"height": 32, "width": 64, "file_format": "png", "workers": 1}
    phantom.write_dataset(tmp_path / "study", train=1, val=2, test_normal=1, test_per_lesion=1, **size)
    return tmp_path / "study"


def retake(study, monkeypatch, *flags):
    """The records of a copy."""
    run_benchmark(elsewhere.main, monkeypatch, "--data", study, "--out", study.parent / "copy", *flags)
    return list_records(study.parent / "copy")


def test_a_copy_says_of_each_radiograph_what_the_original_says(study, monkeypatch):
    original = [record for record in list_records(study) if record.split != "train"]
    copy = retake(study, monkeypatch)
    was, now = ([(each.split, each.label, each.kind, each.patient) for each in records] for records in (original, copy))
    assert sorted(was) == sorted(now) and {"val", "test"} == {split for split, *_ in now}


def test_masks_are_those_of_the_original(study, monkeypatch):
    def masks(records):
        return {(each.patient, each.kind): read_mask(each.mask).tolist() for each in records if each.mask}

    assert masks(retake(study, monkeypatch)) == masks(list_records(study)) != {}


def test_who_changes_nothing_has_the_grey_values_of_the_original(study, monkeypatch):
    copy = retake(study, monkeypatch, "--gamma", 1, "--blur", 0, "--noise", 0)
    same, one = ([each for each in records if each.kind == "cyst"][0] for records in (list_records(study), copy))
    was, now = (read_radiograph(each.path).pixels.astype(float) for each in (same, one))
    assert np.corrcoef(was.ravel(), now.ravel())[0, 1] > 0.9999 and np.ptp(now) == 255


def test_exposure_blur_and_noise_are_what_their_names_say():
    random, dark = np.random.default_rng(0), np.full((64, 64), -0.5)  # a grey of 0.25
    assert np.unique(elsewhere.taken_there(dark, 0.5, 0, 0, random)).tolist() == [128]
    noisy = elsewhere.taken_there(np.zeros((64, 64)), 1, 0, 0.1, random)
    assert noisy.std() / 255 == pytest.approx(0.1, rel=0.1)
    point = np.full((9, 9), -1.0)
    point[4, 4] = 1
    blurred = elsewhere.taken_there(point, 1, 1.0, 0, random)
    assert blurred[4, 4] == round(255 / (2 * np.pi)) and blurred[4, 5] / blurred[4, 4] == pytest.approx(0.607, abs=0.02)


@pytest.mark.parametrize("wrong", [("--gamma", 0), ("--gamma", "nan"), ("--noise", -0.1), ("--seed", -1)])
def test_numbers_that_make_no_radiograph_are_refused(wrong, study, monkeypatch):
    with pytest.raises(UsageError, match="--gamma must be above 0"):
        retake(study, monkeypatch, *wrong)


def test_a_folder_that_holds_something_is_refused(study, monkeypatch):
    retake(study, monkeypatch)
    with pytest.raises(UsageError, match="holds something already"):
        retake(study, monkeypatch)


def others(folder):
    """Phantoms of another place; their manifest calls nobody as the first one does."""
    manifest = phantom.write_dataset(folder / "others", 0, 4, 1, 0, seed=1, height=64, width=128, workers=1)
    head, *rows = manifest.read_text().splitlines()
    named = [f"{row.rpartition(',')[0]},there-{row.rpartition(',')[2]}" for row in rows]
    manifest.write_text("\n".join([head, *named]) + "\n")
    return folder / "others"


def test_a_reader_is_taken_along_and_the_normals_of_there_say_what_is_usual(call, made, tmp_path):
    home, there = tmp_path / "home", tmp_path / "there"
    call("inference", *READER, "--inference.shard", "calibrate", "--inference.calibration", home)
    there.mkdir()
    shutil.copy(home / "reader.pt", there)
    result = call("inference", *READER, "--inference.calibration", there, data=others(tmp_path))
    assert "reader read from" in result.out and "training the reader" not in result.out
    assert (home / "reader.pt").read_bytes() == (there / "reader.pt").read_bytes()
    assert (home / "reader.json").read_bytes() != (there / "reader.json").read_bytes()
    assert (tmp_path / "phase4_inference" / "scores.csv").read_text().count("\n") == 2  # a head, and the one to examine


def test_who_has_no_reader_to_take_along_is_told_so(call, tmp_path):
    result = call("inference", *READER, data=others(tmp_path))
    assert result.code == 2 and "copy reader.pt" in result.error
