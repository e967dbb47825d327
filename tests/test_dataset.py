"""Splits that leak nothing, manifests that fail by row and column, augmentation that depends on (seed, epoch, index) alone."""

import csv
import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from config import DataConfig, UsageError
from dataset import RadiographDataset, open_datasets
from radiographs.manifest import Record, list_records, split_records
from radiographs.reading import ImageReadError

CONFIG = DataConfig(height=32, width=48, num_workers=2, flip=True)
BENCH = Path(__file__).parents[2] / "shared" / "data" / "ufba_bench"


def write_images(folder, count, shape=(40, 60)):
    """PNGs 000.png, 001.png ... of smooth random content."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 8), dtype=np.uint8)
        Image.fromarray(coarse).resize(shape[::-1]).save(folder / f"{i:03}.png")
    return folder


def write_manifest(folder, rows):
    """A manifest.csv whose columns are the keys of its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def record(i, patient=None, label=None, split=None):
    return Record(Path(f"{i}.png"), split, label, "", None, patient or f"patient {i}")


def patients(records):
    return {record.patient for record in records}


@pytest.fixture
def train(tmp_path):
    """A dataset in memory and its augmented twin."""
    dataset = open_datasets(
        {"train": list_records(write_images(tmp_path, 6))}, CONFIG, 7, tmp_path / "skipped_files.csv", quiet=True
    )["train"]
    return dataset, dataset.augmented()


# --- listing -------------------------------------------------------------------------------------------------------------


def test_a_folder_lists_its_files_sorted_with_a_patient_each(tmp_path):
    write_images(tmp_path / "b", 2), write_images(tmp_path / "a", 1)
    records = list_records(tmp_path)
    assert [record.path.relative_to(tmp_path).as_posix() for record in records] == [
        "a/000.png",
        "b/000.png",
        "b/001.png",
    ]
    assert [record.patient for record in records] == ["a/000", "b/000", "b/001"]
    assert all((record.split, record.label, record.kind, record.mask) == (None, None, "", None) for record in records)


def test_a_dicom_brings_its_patient(tmp_path):
    source = Path(pydicom.data.__file__).parent / "test_files" / "MR_small.dcm"
    for name in ("a.dcm", "b.dcm"):
        (tmp_path / name).write_bytes(source.read_bytes())
    assert [record.patient for record in list_records(tmp_path)] == ["4MR1", "4MR1"]


def test_a_manifest_is_read_with_masks_kinds_and_source_as_patient(tmp_path):
    rows = [
        {
            "image": "i/a.png",
            "split": "Valid",
            "label": "0",
            "kind": "normal",
            "mask": "",
            "source": "p1",
            "extra": "x",
        },
        {
            "image": "i/b.png",
            "split": "test",
            "label": "",
            "kind": "cyst",
            "mask": "m/b.png",
            "source": "p2",
            "extra": "",
        },
    ]
    first, second = list_records(write_manifest(tmp_path, rows))
    assert first == Record(tmp_path / "i" / "a.png", "val", 0, "normal", None, "p1")
    assert second == Record(tmp_path / "i" / "b.png", "test", 1, "cyst", tmp_path / "m" / "b.png", "p2")
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
    for root, message in ((tmp_path / name, message) for name, message in expected.items()):
        with pytest.raises(UsageError, match=message):
            list_records(root)


# --- splitting -----------------------------------------------------------------------------------------------------------


def test_an_unlabelled_folder_is_split_by_patient_into_train_and_val():
    records = [record(i, patient=f"p{i % 20}") for i in range(60)]
    splits = split_records(records, CONFIG, 0)
    assert not patients(splits["train"]) & patients(splits["val"]) and splits["test"] == []
    assert len(patients(splits["val"])) == 3 and sorted(splits["train"] + splits["val"], key=records.index) == records


def test_labels_without_splits_send_every_patient_with_a_lesion_to_test():
    records = [record(i, patient=f"p{i % 25}", label=int(i < 5)) for i in range(75)]
    splits = split_records(records, CONFIG, 0)
    groups = [patients(splits[name]) for name in ("train", "val", "test")]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 25 and len(groups[1]) == 3
    assert {f"p{i}" for i in range(5)} < groups[2] and len(groups[2]) == 5 + 3


def test_a_split_depends_on_the_seed_alone():
    records = [record(i) for i in range(40)]
    assert (
        split_records(records, CONFIG, 1)
        == split_records(list(records), CONFIG, 1)
        != split_records(records, CONFIG, 2)
    )
    shuffled = split_records(records[::-1], CONFIG, 1)
    assert patients(shuffled["val"]) == patients(split_records(records, CONFIG, 1)["val"])


def test_the_splits_of_a_manifest_are_kept_but_only_normals_train():
    records = [
        record(0, split="train", label=0),
        record(1, split="train", label=1),
        record(2, split="val"),
        record(3, split="test", label=1),
    ]
    with pytest.warns(UserWarning, match="1 abnormal radiographs of the split train"):
        assert split_records(records, CONFIG, 0) == {"train": records[:1], "val": records[2:3], "test": records[3:]}


def test_a_manifest_without_val_draws_one_from_train():
    records = [record(i, split="train" if i < 20 else "test") for i in range(30)]
    splits = split_records(records, CONFIG, 0)
    assert (len(splits["train"]), len(splits["val"]), splits["test"]) == (17, 3, records[20:])


@pytest.mark.parametrize("pair", [("train", "val"), ("train", "test"), ("val", "test")])
def test_a_patient_in_two_splits_is_refused_without_being_named(pair):
    records = [
        record(0, split="train"),
        record(1, split="val"),
        *(record(name, "Jane Doe", split=name) for name in pair),
    ]
    with pytest.raises(UsageError, match="^1 patients of the manifest") as caught:
        split_records(records, CONFIG, 0)
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([record(i, label=1) for i in range(5)], "no normal radiograph to train on"),
        ([record(0, split="test"), record(1, split="val")], "no normal radiograph to train on"),
        ([record(i, patient="ANONYMOUS") for i in range(5)], "column patient"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_remedy(records, message):
    with pytest.raises(UsageError, match=message):
        split_records(records, CONFIG, 0)


# --- reading -------------------------------------------------------------------------------------------------------------


def test_memory_and_disk_give_equal_items(tmp_path):
    records = list_records(write_images(tmp_path, 4))
    configs = (dataclasses.replace(CONFIG, cache_gb=gigabytes) for gigabytes in (1, 0))
    kept, read = (
        open_datasets({"train": records}, config, 0, tmp_path / "skipped.csv", quiet=True)["train"]
        for config in configs
    )
    assert kept._samples and read._samples is None
    for a, b in zip((kept[i] for i in range(4)), (read[i] for i in range(4)), strict=True):
        assert torch.equal(a["image"], b["image"]) and {**a, "image": 0, "mask": 0} == {**b, "image": 0, "mask": 0}


def test_each_file_is_read_once_and_a_second_look_survives_its_deletion(train):
    dataset, _ = train
    first = dataset[0]["image"].clone()
    dataset[0]["image"].zero_()
    for entry in dataset.records:
        entry.path.unlink()
    assert torch.equal(dataset[0]["image"], first)


def test_an_item_holds_what_inference_needs(tmp_path):
    write_images(tmp_path, 2)
    mask = np.zeros((40, 60), np.uint8)
    mask[7, 31] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    rows = [{"image": "000.png", "mask": "m.png", "label": "1"}, {"image": "001.png", "mask": "", "label": ""}]
    first, second = RadiographDataset(list_records(write_manifest(tmp_path, rows)), CONFIG)
    assert first["image"].shape == first["mask"].shape == (1, 32, 48) and (
        first["image"].dtype,
        first["mask"].dtype,
    ) == (torch.float32, torch.uint8)
    assert first["mask"].sum() == 1 and second["mask"].sum() == 0 and first["image"].abs().max() <= 1
    names = ("label", "has_mask", "index", "original_height", "original_width")
    assert [[item[name] for name in names] for item in (first, second)] == [
        [1, True, 0, 40, 60],
        [-1, False, 1, 40, 60],
    ]


def test_unreadable_files_are_listed_and_left_out(tmp_path):
    (write_images(tmp_path / "data", 20) / "007.png").write_text("<html>")
    records, report = list_records(tmp_path / "data"), tmp_path / "out" / "skipped_files.csv"
    with pytest.warns(UserWarning, match="1 of 20 files"):
        data = open_datasets({"train": records[:15], "val": records[15:]}, CONFIG, 0, report)
    assert (len(data["train"]), len(data["val"])) == (14, 5)
    with open(report, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["file"].endswith("007.png") and row["reason"].startswith("007.png: neither a DICOM file")
    open_datasets({"train": records[:5]}, CONFIG, 0, report)
    assert not report.exists()


def test_too_many_unreadable_files_stop_the_run(tmp_path):
    folder = write_images(tmp_path / "data", 10)
    (folder / "007.png").write_text("<html>")
    with (
        pytest.warns(UserWarning),
        pytest.raises(UsageError, match=r"1 of 10 files cannot be read, see .*skipped_files.csv"),
    ):
        open_datasets({"train": list_records(folder)}, CONFIG, 0, tmp_path / "skipped_files.csv")


def test_an_unreadable_mask_and_one_of_another_size_name_the_mask(tmp_path):
    write_images(tmp_path, 2)
    Image.new("L", (30, 30)).save(tmp_path / "m.png")
    rows = [
        {"image": "000.png", "mask": "m.png", "label": "1"},
        {"image": "001.png", "mask": "absent.png", "label": "1"},
    ]
    dataset = RadiographDataset(list_records(write_manifest(tmp_path, rows)), CONFIG)
    for index, reason in ((0, r"m.png: the mask has \(30, 30\) pixels"), (1, "absent.png: No such file")):
        with pytest.raises(ImageReadError, match=reason):
            dataset[index]


@pytest.mark.parametrize("content", [b"<html>", None])
def test_streaming_raises_at_access(tmp_path, content):
    write_images(tmp_path, 2)
    Image.new("L", (50, 50), 7).save(tmp_path / "000.png")
    if content:
        (tmp_path / "000.png").write_bytes(content)
    dataset = RadiographDataset(list_records(tmp_path), CONFIG)
    with pytest.raises(ImageReadError, match="000.png: " + ("neither" if content else "no contrast")):
        dataset[0]
    assert dataset[1]["index"] == 1


# --- augmentation --------------------------------------------------------------------------------------------------------


def test_augmentation_depends_on_seed_epoch_and_index_alone(train):
    dataset, augmented = train
    other_seed = RadiographDataset(dataset.records, CONFIG, augment=True, seed=8)
    item = augmented[3, 2]["image"]
    augmented[0, 0], augmented[9, 5]
    assert torch.equal(augmented[3, 2]["image"], item)
    for different in (augmented[4, 2], augmented[2, 3], other_seed[3, 2], dataset[3, 2]):
        assert not torch.equal(different["image"], item)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_augmentation_does_not_depend_on_workers_or_order(train, workers):
    _, augmented = train
    keys = [(1, i) for i in (4, 0, 5, 2)]
    loaded = [
        item
        for batch in DataLoader(augmented, batch_size=2, sampler=keys, num_workers=workers)
        for item in batch["image"]
    ]
    for key, image in zip(keys, loaded, strict=True):
        assert torch.equal(image, augmented[key]["image"])


def test_augmented_images_stay_in_range_and_close_to_the_plain_one(train):
    dataset, augmented = train
    still = RadiographDataset(dataset.records, dataclasses.replace(CONFIG, flip=False), augment=True, seed=0)
    assert all(augmented[epoch, 0]["image"].abs().max() <= 1 for epoch in range(20))
    assert max((still[epoch, 0]["image"] - dataset[0]["image"]).abs().mean() for epoch in range(20)) < 0.35


def test_augmentation_with_everything_at_zero_changes_nothing(train):
    dataset, _ = train
    names = ("rotate_degrees", "shift_share", "scale_share", "brightness", "contrast", "gamma", "noise_std")
    off = RadiographDataset(
        dataset.records, dataclasses.replace(CONFIG, flip=False, **dict.fromkeys(names, 0)), augment=True
    )
    torch.testing.assert_close(off[5, 1]["image"], dataset[1]["image"], atol=1e-6, rtol=0)


def test_a_mask_moves_with_its_image(tmp_path):
    Image.fromarray(np.kron([[0, 0, 0], [0, 255, 0]], np.ones((20, 20))).astype(np.uint8)).save(tmp_path / "a.png")
    config = dataclasses.replace(
        CONFIG, height=40, width=60, rotate_degrees=20, shift_share=0.2, brightness=0, contrast=0, gamma=0, noise_std=0
    )
    (entry,) = list_records(tmp_path)
    dataset = RadiographDataset([dataclasses.replace(entry, mask=entry.path)], config, augment=True)
    for epoch in range(10):
        item = dataset[epoch, 0]
        assert ((item["image"] > 0) != (item["mask"] > 0)).float().mean() < 0.03


def test_a_dataset_travels_to_a_spawned_worker(train):
    _, augmented = train
    image = augmented[0]["image"]
    assert torch.equal(pickle.loads(pickle.dumps(augmented))[0]["image"], image)


@pytest.mark.skipif(not BENCH.exists(), reason="the real radiographs are not beside the repository")
def test_the_real_benchmark_is_read_whole(tmp_path):
    splits = split_records(list_records(BENCH), CONFIG, 0)
    data = open_datasets(splits, CONFIG, 0, tmp_path / "skipped_files.csv", quiet=True)
    assert {name: len(dataset) for name, dataset in data.items()} == {"train": 198, "val": 40, "test": 346}
    assert sum(record.label for record in splits["test"]) == 306
    assert all(data["test"][i]["mask"].any() for i, record in enumerate(splits["test"]) if record.mask)
