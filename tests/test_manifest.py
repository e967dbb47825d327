"""Manifests that fail by row and column, patients from headers and folders, splits that no arriving file moves."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import (
    BasicTextSRStorage,
    EncapsulatedPDFStorage,
    GrayscaleSoftcopyPresentationStateStorage,
    KeyObjectSelectionDocumentStorage,
    MediaStorageDirectoryStorage,
    SegmentationStorage,
)
from test_reading import noise, write_dicom

from checks import UsageError
from config import Config, DataConfig, RuntimeConfig
from radiographs.manifest import (
    FILES_PER_PATIENT,
    LARGEST_PATIENT,
    Record,
    describe_patients,
    list_records,
    split_records,
)
from radiographs.reading import ImageReadError, read_radiograph

CONFIG = DataConfig()
NOT_IMAGES = [BasicTextSRStorage, GrayscaleSoftcopyPresentationStateStorage, MediaStorageDirectoryStorage,
              EncapsulatedPDFStorage, KeyObjectSelectionDocumentStorage, SegmentationStorage]  # fmt: skip


def write_images(folder, count, shape=(40, 60)):
    """PNGs 000.png, 001.png ... of smooth random content."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 8), dtype=np.uint8)
        Image.fromarray(coarse).resize(shape[::-1]).save(folder / f"{i:03}.png")
    return folder


def write_files(folder, *names):
    """Empty files: who is listed, and whose they are, is decided without reading a picture."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def write_manifest(folder, rows):
    """A manifest.csv whose columns are the keys of its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def record(i, patient=None, label=None, split=None, rule="file"):
    return Record(Path(f"{i}.png"), split, label, "", None, patient or f"patient {i}", rule)


def patients(records):
    return {record.patient for record in records}


def split_of_each(records, config=CONFIG):
    """Patient -> name of the split."""
    splits = split_records(records, config)
    return {record.patient: name for name, split in splits.items() for record in split}


# --- listing ---------------------------------------------------------------------------------------------------------


def test_a_folder_lists_its_files_sorted(tmp_path):
    records = list_records(write_files(tmp_path, "b/000.png", "b/001.png", "a/000.png"))
    found = [record.path.relative_to(tmp_path).as_posix() for record in records]
    assert found == ["a/000.png", "b/000.png", "b/001.png"]
    assert all((record.split, record.label, record.kind, record.mask) == (None, None, "", None) for record in records)


def test_a_manifest_is_read_with_masks_kinds_and_source_as_patient(tmp_path):
    names = ("image", "split", "label", "kind", "mask", "source", "extra")
    cells = [("i/a.png", "Valid", "0", "normal", "", "p1", "x"), ("i/b.png", "test", "", "cyst", "m/b.png", "p2", "")]
    write_manifest(tmp_path, [dict(zip(names, row, strict=True)) for row in cells])
    first, second = list_records(tmp_path)
    assert first == Record(tmp_path / "i/a.png", "val", 0, "normal", None, "p1", "manifest")
    assert second == Record(tmp_path / "i/b.png", "test", 1, "cyst", tmp_path / "m/b.png", "p2", "manifest")
    assert list_records(tmp_path / "manifest.csv") == [first, second]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": ""}, "row 3, column image: is empty"),
        ({"image": "../b.png"}, "row 3, column image: .* leaves the folder"),
        ({"image": "/etc/passwd"}, "row 3, column image: .* leaves the folder"),
        ({"image": "a.png"}, "row 3, column image: the same file as in row 2"),
        ({"mask": "../m.png", "label": "1"}, "row 3, column mask: .* leaves the folder"),
        ({"mask": "m.png"}, "row 3, column label: is empty beside a mask"),
        ({"split": "dev"}, "row 3, column split: 'dev' is unknown"),
        ({"split": "train"}, "row 2, column split: is empty while"),
        ({"label": "2"}, "row 3, column label: '2' is unknown"),
        ({"label": "0", "kind": "cyst"}, "row 3, column label: 0 contradicts the kind 'cyst'"),
        ({"label": "1", "kind": "normal"}, "row 3, column label: 1 contradicts the kind 'normal'"),
    ],
)
def test_a_bad_value_in_a_manifest_is_named_by_row_and_column(tmp_path, row, message):
    with pytest.raises(UsageError, match=message):
        list_records(write_manifest(tmp_path, [{"image": "a.png"}, {"image": "b.png"} | row]))


@pytest.mark.parametrize(
    ("text", "message"),
    [("file;label\n", "no column 'image'"), ("image,label\n", "no rows"), ("", "no column"), ("image\n\xff", "UTF-8")],
)
def test_a_table_that_is_no_manifest_is_refused(tmp_path, text, message):
    (tmp_path / "manifest.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=message):
        list_records(tmp_path)


def test_a_root_without_radiographs_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "notes.txt").touch()
    expected = {"absent": "does not exist: set data.root", ".": r"\.dcm .*\.bmp", "notes.txt": "neither a folder nor"}
    for name, message in expected.items():
        with pytest.raises(UsageError, match=message):
            list_records(tmp_path / name)


def without_pixels(path, sop_class):
    """A DICOM object of that class that has neither rows nor pixels."""
    dataset = pydicom.dcmread(write_dicom(path, noise()))
    for name in ("Rows", "Columns", "PixelData"):
        delattr(dataset, name)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.save_as(path)


def test_dicom_objects_that_are_no_images_are_passed_over_with_one_line(tmp_path):
    image = write_dicom(tmp_path / "image.dcm", noise())
    for i, sop_class in enumerate(NOT_IMAGES):
        without_pixels(tmp_path / f"{i}.dcm", sop_class)
    without_pixels(tmp_path / "DICOMDIR", MediaStorageDirectoryStorage)
    without_pixels(tmp_path / "private.dcm", "1.2.826.0.1.3680043.8.498.1")
    with pytest.warns(UserWarning) as caught:
        assert [record.path for record in list_records(tmp_path)] == [image]
    assert [str(warning.message)[:30] for warning in caught] == ["8 DICOM files are not images ("]


def test_a_segmentation_with_pixels_is_no_radiograph(tmp_path):
    write_dicom(tmp_path / "a.dcm", noise(), SOPClassUID=SegmentationStorage)
    with pytest.warns(UserWarning, match="^1 DICOM files"), pytest.raises(UsageError, match="holds no radiographs"):
        list_records(tmp_path)


def test_a_private_class_with_pixels_is_listed(tmp_path):
    write_dicom(tmp_path / "a.dcm", noise(), SOPClassUID="1.2.826.0.1.3680043.8.498.1")
    assert len(list_records(tmp_path)) == 1


@pytest.mark.parametrize("lost", [("PixelData",), ("Rows", "Columns", "PixelData")])
def test_an_image_that_lost_its_pixels_is_listed_and_bad(tmp_path, lost):
    dataset = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", noise()))
    for name in lost:
        delattr(dataset, name)
    dataset.save_as(tmp_path / "a.dcm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (entry,) = list_records(tmp_path)
    with pytest.raises(ImageReadError, match="without pixel data"):
        read_radiograph(entry.path)


# --- patients --------------------------------------------------------------------------------------------------------


def patients_of(folder, *arguments):
    """Place of each file below the folder -> (patient, rule)."""
    records = list_records(folder, *arguments)
    return {r.path.relative_to(folder).as_posix(): (r.patient, r.patient_rule) for r in records}


def test_a_dicom_header_names_the_patient_and_wins_over_its_folder(tmp_path):
    for name in ("A00/a.dcm", "A01/b.dcm"):
        (tmp_path / name).parent.mkdir()
        write_dicom(tmp_path / name, noise(), PatientID="4MR1")
    for rule in ("auto", "folder", "file"):
        assert set(patients_of(tmp_path, rule).values()) == {("4MR1", "header")}


def test_files_in_folders_of_patients_belong_to_one_patient(tmp_path):
    write_files(tmp_path, "A00/visit1.png", "A00/visit2.png", "A01/visit1.png")
    expected = {"A00/visit1.png": "A00", "A00/visit2.png": "A00", "A01/visit1.png": "A01"}
    assert patients_of(tmp_path) == {place: (patient, "folder") for place, patient in expected.items()}


def test_the_shallowest_depth_at_which_folders_look_like_patients_is_taken(tmp_path):
    clinics = [f"clinic{c}/P{p:02}/{visit}/left.png" for c in "AB" for p in range(20) for visit in ("2019", "2021")]
    write_files(tmp_path, *clinics)
    found = patients_of(tmp_path)
    assert {patient for patient, _ in found.values()} == {f"clinic{c}/P{p:02}" for c in "AB" for p in range(20)}
    assert len(patients_of(tmp_path / "clinicA")) == 40
    assert found["clinicA/P07/2019/left.png"] == ("clinicA/P07", "folder")


@pytest.mark.parametrize("folders", [("normals",), ("normal", "cyst"), ("2019", "2020", "2021")])
def test_folders_of_many_files_or_one_folder_alone_are_no_patients(tmp_path, folders):
    write_files(tmp_path, *(f"{folder}/{i}.png" for folder in folders for i in range(FILES_PER_PATIENT + 1)))
    found = patients_of(tmp_path)
    assert all(found[place] == (place.removesuffix(".png"), "file") for place in found)


def test_a_few_files_beside_the_folders_of_patients_are_their_own(tmp_path):
    write_files(tmp_path, "stray.png", *(f"A{i}/{j}.png" for i in range(5) for j in range(2)))
    found = patients_of(tmp_path)
    assert found["stray.png"] == ("stray", "file") and found["A3/1.png"] == ("A3", "folder")


def test_a_large_folder_beside_those_of_patients_is_a_collection(tmp_path):
    unsorted = [f"unsorted/{i}.png" for i in range(LARGEST_PATIENT + 1)]
    write_files(tmp_path, *unsorted, *(f"A{i}/{j}.png" for i in range(30) for j in range(2)))
    found = patients_of(tmp_path)
    assert found["unsorted/7.png"] == ("unsorted/7", "file") and found["A3/1.png"] == ("A3", "folder")


def test_classes_of_which_most_are_small_are_no_patients(tmp_path):
    small = [f"{kind}/{i}.png" for kind in ("cyst", "caries", "implant") for i in range(4)]
    write_files(tmp_path, *small, *(f"normal/{i}.png" for i in range(LARGEST_PATIENT + 1)))
    assert {rule for _, rule in patients_of(tmp_path).values()} == {"file"}


def test_patient_from_folder_takes_the_parent_and_file_takes_the_file(tmp_path):
    write_files(tmp_path, "A00/2019/1.png", "A00/2019/2.png", "stray.png")
    by_folder, by_file = patients_of(tmp_path, "folder"), patients_of(tmp_path, "file")
    assert [patient for patient, _ in by_folder.values()] == ["A00/2019", "A00/2019", "."]
    assert [patient for patient, _ in by_file.values()] == ["A00/2019/1", "A00/2019/2", "stray"]


def test_files_named_by_uid_stay_apart_although_the_last_number_looks_like_a_suffix(tmp_path):
    for name in ("1.2.840.1", "1.2.840.2", "1.2.840.3.dcm"):
        write_dicom(tmp_path / name, noise())
    assert [patient for patient, _ in patients_of(tmp_path).values()] == ["1.2.840.1", "1.2.840.2", "1.2.840.3"]


def test_a_dicom_series_without_patient_ids_goes_by_its_folders(tmp_path):
    for i in range(4):
        (tmp_path / f"A{i // 2}").mkdir(exist_ok=True)
        write_dicom(tmp_path / f"A{i // 2}" / f"{i}.dcm", noise())
    assert [patient for patient, _ in patients_of(tmp_path).values()] == ["A0", "A0", "A1", "A1"]


def test_an_export_beside_a_dicom_belongs_to_the_patient_of_its_header(tmp_path):
    for i in range(3):
        write_files(tmp_path, f"A{i}/export.png")
        write_dicom(tmp_path / f"A{i}" / "original.dcm", noise(), PatientID=f"id {i}")
    assert patients_of(tmp_path)["A1/export.png"] == ("id 1", "folder")
    write_dicom(tmp_path / "A1" / "of_another.dcm", noise(), PatientID="id 7")
    assert patients_of(tmp_path)["A1/export.png"] == ("A1", "folder")


def test_a_manifest_without_a_patient_goes_by_folders_and_a_column_wins(tmp_path):
    rows = [{"image": f"i/A{i // 2}/{i}.png", "patient": "Jo" if i == 5 else ""} for i in range(6)]
    found = patients_of(write_manifest(tmp_path, rows))
    assert [found[row["image"]][0] for row in rows[:4]] == ["i/A0", "i/A0", "i/A1", "i/A1"]
    assert found["i/A2/5.png"] == ("Jo", "manifest") and found["i/A2/4.png"] == ("Jo", "folder")
    assert patients_of(tmp_path, "file")["i/A0/0.png"] == ("i/A0/0", "file")


def test_the_patients_are_described_in_one_line():
    records = [record(i, f"p{i % 238}", rule="header" if i % 238 < 200 else "folder") for i in range(400)]
    hint = "(data.patient_from file makes each file its own)"
    assert describe_patients(records) == f"238 patients: 200 by PatientID, 38 by folder {hint}"
    assert describe_patients([record(0)]) == "1 patient: 1 by file"
    assert describe_patients([record(0, "p", rule="folder"), record(1, "p", rule="header")]).endswith("1 by PatientID")


# --- splitting -------------------------------------------------------------------------------------------------------


def test_an_unlabelled_folder_is_split_by_patient_into_train_and_val():
    records = [record(i, patient=f"p{i % 20}") for i in range(60)]
    splits = split_records(records, CONFIG)
    assert not patients(splits["train"]) & patients(splits["val"]) and splits["test"] == []
    assert sorted(splits["train"] + splits["val"], key=records.index) == records


def test_labels_without_splits_send_every_patient_with_a_lesion_to_test_and_some_normals_too():
    records = [record(i, patient=f"p{i % 25}", label=int(i < 5)) for i in range(75)]
    splits = split_records(records, CONFIG)
    groups = [patients(splits[name]) for name in ("train", "val", "test")]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 25 and all(groups)
    assert {f"p{i}" for i in range(5)} < groups[2]


@pytest.mark.parametrize("label", [None, 0])
def test_a_file_that_goes_leaves_every_other_patient_in_its_split(label):
    records = [record(i, label=label) for i in range(200)] + [record(i, label=1) for i in range(200, 210)]
    before = split_of_each(records)
    for gone in range(0, 210, 7):
        after = split_of_each(records[:gone] + records[gone + 1 :])
        assert after.items() < before.items()


def test_files_that_come_leave_every_earlier_patient_in_their_split():
    records = [record(i) for i in range(1010)]
    arrived, earlier = records[500:510], records[:500] + records[510:]
    before, after = split_of_each(earlier), split_of_each(records)
    assert before.items() < after.items() and patients(arrived) == after.keys() - before.keys()


def test_the_order_of_the_files_says_nothing():
    records = [record(i) for i in range(40)]
    assert split_of_each(records[::-1]) == split_of_each(records)


def test_the_seed_of_the_run_leaves_the_split_alone_and_split_seed_moves_it():
    records = [record(i) for i in range(100)]
    plain, other_run = Config(), Config(runtime=RuntimeConfig(seed=5))
    assert split_of_each(records, plain.data) == split_of_each(records, other_run.data)
    assert split_of_each(records, plain.data) != split_of_each(records, DataConfig(split_seed=1))


@pytest.mark.parametrize("split_seed", range(5))
def test_the_shares_come_out_near_what_was_asked(split_seed):
    config = DataConfig(val_share=0.15, test_share=0.2, split_seed=split_seed)
    records = [record(i, label=0) for i in range(2000)] + [record(2000, label=1)]
    splits = split_records(records, config)
    test, val = (len(splits["test"]) - 1) / 2000, len(splits["val"]) / (2000 - len(splits["test"]))
    for share, asked, drawn_from in ((test, 0.2, 2000), (val, 0.15, 1600)):
        assert abs(share - asked) < 4 * np.sqrt(asked * (1 - asked) / drawn_from)  # four binomial standard deviations


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("val_share", [0.0, 0.001, 0.9])
def test_however_few_there_are_at_least_one_patient_validates_and_one_trains(count, val_share):
    for split_seed in range(10):
        config = DataConfig(val_share=val_share, split_seed=split_seed)
        splits = split_records([record(i) for i in range(count)], config)
        assert splits["train"] and splits["val"]


def test_the_splits_of_a_manifest_are_kept_but_only_normals_train():
    given = (("train", 0), ("train", 1), ("val", None), ("test", 1))
    records = [record(i, split=split, label=label) for i, (split, label) in enumerate(given)]
    with pytest.warns(UserWarning, match="1 abnormal radiographs of the split train"):
        assert split_records(records, CONFIG) == {"train": records[:1], "val": records[2:3], "test": records[3:]}


def test_who_is_taken_for_normal_without_a_label_is_told_where_others_have_one(recwarn):
    known = [record(0, label=0, split="train"), record(1, label=1, split="test"), record(2, label=0, split="val")]
    split_records(known, CONFIG)
    split_records([record(i) for i in range(9)], CONFIG)  # a folder of normals
    assert not recwarn.list
    unknown = [record(3, split="train"), record(4, split="train"), record(5, split="test")]
    with pytest.warns(UserWarning, match="without a label are taken for normal .*: 2 of 3 in train$"):
        split_records([*known, *unknown], CONFIG)


def test_a_manifest_without_val_draws_one_from_train():
    records = [record(i, split="train" if i < 20 else "test") for i in range(30)]
    splits = split_records(records, CONFIG)
    assert splits["val"] and splits["test"] == records[20:]
    assert sorted(splits["train"] + splits["val"], key=records.index) == records[:20]


@pytest.mark.parametrize("pair", [("train", "val"), ("train", "test"), ("val", "test")])
@pytest.mark.parametrize(("rule", "remedy"), [("manifest", "manifest.csv$"), ("folder", "data.patient_from file$")])
def test_a_patient_in_two_splits_is_refused_without_being_named(pair, rule, remedy):
    both = [record(name, "Jane Doe", split=name, rule=rule) for name in pair]
    with pytest.raises(UsageError, match=f"^1 patients of the manifest.*{remedy}") as caught:
        split_records([record(0, split="train"), record(1, split="val"), *both], CONFIG)
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([record(i, label=1) for i in range(5)], "no normal radiograph to train on"),
        ([record(0, split="test"), record(1, split="val")], "no normal radiograph to train on"),
        ([record(i, patient="ANONYMOUS", rule="header") for i in range(5)], "column patient of a manifest.csv$"),
        ([record(i, patient="A00", rule="folder") for i in range(5)], "set data.patient_from file$"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_remedy(records, message):
    with pytest.raises(UsageError, match=message):
        split_records(records, CONFIG)


def test_who_examines_needs_no_training_normal_of_a_manifest():
    records = [record(0, split="test"), record(1, split="val"), record(2, split="test", label=1)]
    splits = split_records(records, CONFIG, trains=False)
    assert splits == {"train": [], "val": records[1:2], "test": [records[0], records[2]]}
    with pytest.raises(UsageError, match="no normal radiograph"):
        split_records([record(i, label=1) for i in range(5)], CONFIG, trains=False)


@pytest.mark.parametrize(("modality", "named"), [("CT", True), ("mr ", True), ("US", True), ("PX", False), ("", False)])
def test_what_says_that_it_is_no_radiograph_is_named(modality, named, tmp_path):
    for number in range(2):
        write_dicom(tmp_path / f"{number}.dcm", noise(), Modality=modality if number else "PX", PatientID=f"P{number}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert len(list_records(tmp_path)) == 2
    words = [str(warning.message) for warning in said if "no radiographs" in str(warning.message)]
    assert words == (
        [
            f"some DICOM files say that they are no radiographs (1 {modality.strip().upper()}): see whether "
            "they belong here"
        ]
        if named
        else []
    )
