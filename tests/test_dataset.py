"""Radiographs read once or as a stream, bad files reported without naming anyone, augmentation that repeats itself."""

import csv
import dataclasses
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_manifest import write_images, write_manifest
from torch.utils.data import DataLoader

import dataset as dataset_module
from checks import UsageError
from config import DataConfig
from dataset import RadiographDataset, attempt_sample, open_datasets, read_batches, read_sample, report_skipped
from radiographs.manifest import list_records, split_records
from radiographs.reading import ImageReadError

CONFIG = DataConfig(height=32, width=48, num_workers=2, flip=True)
BENCH = Path(__file__).parents[2] / "shared" / "data" / "ufba_bench"


def stream(records, config=CONFIG, seed=0):
    """A dataset that reads each file anew."""
    found = [attempt_sample(record, config) for record in records]
    digests = ["" if isinstance(each, ImageReadError) else each.digest for each in found]
    return RadiographDataset(records, config, seed, digests, [], None)


@pytest.fixture
def train(tmp_path):
    """A dataset in memory and its augmented twin."""
    splits = {"train": list_records(write_images(tmp_path, 6))}
    dataset = open_datasets(splits, CONFIG, 7, tmp_path / "skipped_local_only.csv", quiet=True)["train"]
    return dataset, dataset.augmented()


# --- reading ---------------------------------------------------------------------------------------------------------


def test_memory_and_disk_give_equal_items(tmp_path):
    records = list_records(write_images(tmp_path, 4))

    def opened(gigabytes):
        config = dataclasses.replace(CONFIG, cache_gb=gigabytes)
        return open_datasets({"train": records}, config, 0, tmp_path / "skipped.csv", quiet=True)["train"]

    kept, read = opened(1), opened(0)
    assert kept._samples and read._samples is None and kept.digests == read.digests
    for i in range(4):
        a, b = kept[i], read[i]
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
    first, second = stream(list_records(write_manifest(tmp_path, rows)))
    assert first["image"].shape == first["mask"].shape == (1, 32, 48)
    assert first["image"].dtype == torch.float32 and first["mask"].dtype == torch.uint8
    assert first["mask"].sum() == 1 and second["mask"].sum() == 0 and first["image"].abs().max() <= 1
    names = ("label", "has_mask", "index", "original_height", "original_width")
    assert [first[name] for name in names] == [1, True, 0, 40, 60]
    assert [second[name] for name in names] == [-1, False, 1, 40, 60]


def test_unreadable_files_are_listed_and_left_out(tmp_path):
    (write_images(tmp_path / "data", 20) / "007.png").write_text("<html>")
    records, report = list_records(tmp_path / "data"), tmp_path / "out" / "skipped_local_only.csv"
    with pytest.warns(UserWarning, match=r"1 of 20 files cannot be read and are left out: see .*skipped_local"):
        data = open_datasets({"train": records[:15], "val": records[15:]}, CONFIG, 0, report)
    assert (len(data["train"]), len(data["val"])) == (14, 5)
    with open(report, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["file"] == "007.png" and row["reason"].startswith("neither a DICOM file")
    open_datasets({"train": records[:5]}, CONFIG, 0, report)
    assert not report.exists()


def test_too_many_unreadable_files_stop_the_run(tmp_path):
    folder = write_images(tmp_path / "data", 10)
    (folder / "007.png").write_text("<html>")
    message = r"1 of 10 files cannot be read, see .*skipped_local_only.csv"
    with pytest.warns(UserWarning), pytest.raises(UsageError, match=message):
        open_datasets({"train": list_records(folder)}, CONFIG, 0, tmp_path / "skipped_local_only.csv")


def test_a_split_of_which_nothing_can_be_read_stops_the_run_whatever_the_share(tmp_path):
    records = list_records(write_images(tmp_path / "data", 10))
    records[9].path.write_text("<html>")
    config = dataclasses.replace(CONFIG, max_bad_share=1)
    with pytest.warns(UserWarning), pytest.raises(UsageError, match="1 of 10 files"):
        open_datasets({"train": records[:9], "val": records[9:]}, config, 0, tmp_path / "skipped_local_only.csv")


def test_neither_the_report_nor_a_warning_names_a_folder_that_may_name_a_patient(tmp_path):
    folder = write_images(tmp_path / "data" / "Jane Doe", 3).parent
    (folder / "Jane Doe" / "001.png").write_text("<html>")
    (folder / "Jane Doe" / "002.png").unlink()
    Image.new("L", (40, 40)).save(folder / "Jane Doe" / "m.png")
    rows = [{"image": f"Jane Doe/00{i}.png", "mask": "", "label": "0"} for i in range(3)]
    rows[0]["mask"] = "Jane Doe/m.png"
    records, errors = list_records(write_manifest(folder, rows)), []
    assert list(read_batches(records, CONFIG, 2, errors)) == []
    with pytest.warns(UserWarning) as caught:
        report_skipped(errors, 3, tmp_path / "skipped_local_only.csv")
    text = (tmp_path / "skipped_local_only.csv").read_text()
    assert [line.split(",")[0] for line in text.splitlines()] == ["file", "000.png", "001.png", "002.png"]
    assert "Jane" not in text + "".join(str(warning.message) for warning in caught) + "".join(map(str, errors))


def test_an_unreadable_mask_and_one_of_another_size_are_errors_of_their_image(tmp_path):
    write_images(tmp_path, 2)
    Image.new("L", (30, 30)).save(tmp_path / "m.png")
    rows = [{"image": f"00{i}.png", "mask": mask, "label": "1"} for i, mask in enumerate(("m.png", "absent.png"))]
    records = list_records(write_manifest(tmp_path, rows))
    reasons = (r"000.png: its mask m.png has \(30, 30\) pixels", "001.png: its mask absent.png .*: No such file")
    for index, reason in enumerate(reasons):
        with pytest.raises(ImageReadError, match=reason) as caught:
            read_sample(records[index], CONFIG)
        assert caught.value.path == records[index].path  # it is counted as an error of the image


@pytest.mark.parametrize("content", [b"<html>", None])
def test_streaming_raises_at_access(tmp_path, content):
    write_images(tmp_path, 2)
    Image.new("L", (50, 50), 7).save(tmp_path / "000.png")
    if content:
        (tmp_path / "000.png").write_bytes(content)
    dataset = stream(list_records(tmp_path))
    with pytest.raises(UsageError, match="000.png: " + ("neither" if content else "no contrast") + ".*at first"):
        dataset[0]
    assert dataset[1]["index"] == 1


def test_a_file_that_was_replaced_while_it_is_used_is_refused(tmp_path):
    write_images(tmp_path, 2)
    dataset = stream(list_records(tmp_path))
    shutil.copy(tmp_path / "001.png", tmp_path / "000.png")
    with pytest.raises(UsageError, match="000.png changed while it was used"):
        dataset[0]
    assert dataset[1]["index"] == 1


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_batches_come_in_order_with_their_positions_and_without_the_bad(tmp_path, workers, batch_size):
    records = list_records(write_images(tmp_path, 7))
    for position in (1, 3):
        records[position].path.write_text("<html>")
    errors, config = [], dataclasses.replace(CONFIG, num_workers=workers)
    batches = list(read_batches(records, config, batch_size, errors))
    assert [error.path.name for error in errors] == ["001.png", "003.png"]
    assert [position for batch in batches for position, _ in batch] == [0, 2, 4, 5, 6]
    assert all(batch and len({position // batch_size for position, _ in batch}) == 1 for batch in batches)
    whole = stream(records)
    assert all(torch.equal(torch.from_numpy(x.image), whole[i]["image"][0]) for batch in batches for i, x in batch)


def test_no_records_give_no_batches():
    assert list(read_batches([], CONFIG, 4, [])) == []


@pytest.fixture
def reads(monkeypatch):
    """Instead of reading: the names asked for so far, and an event for each name, set when its turn comes."""
    asked, begun = [], {f"{i:03}.png": threading.Event() for i in range(20)}

    def read(record, config, times=1, finest=None):
        asked.append(record.path.name)
        begun[record.path.name].set()
        if record.path.name == "005.png":
            raise MemoryError("not an ImageReadError")
        return dataset_module.Sample(np.zeros((2, 2), np.float32), None, (2, 2), "", np.zeros(32, np.uint8))

    monkeypatch.setattr(dataset_module, "read_sample", read)
    return asked, begun


def test_exactly_one_batch_is_read_ahead(reads, tmp_path):
    asked, begun = reads
    records = [entry for entry in list_records(write_images(tmp_path, 20)) if entry.path.name != "005.png"]
    batches = read_batches(records, CONFIG, 4, [])
    next(batches)
    assert begun[records[7].path.name].wait(10), "the second batch is read to its end while the first is used"
    batches.close()
    assert sorted(asked) == [record.path.name for record in records[:8]]


def test_every_thread_has_a_file_to_read_ahead_however_small_a_batch(reads, tmp_path):
    asked, begun = reads
    records = [entry for entry in list_records(write_images(tmp_path, 20)) if entry.path.name != "005.png"]
    batches = read_batches(records, dataclasses.replace(CONFIG, num_workers=3), 2, [])
    next(batches)
    assert begun[records[5].path.name].wait(10), "the third batch is read while the first is used"
    batches.close()
    assert sorted(asked) == [record.path.name for record in records[:6]]


def readers():
    """Threads that read files; a progress bar has one of its own, and so has what compiles networks."""
    found = [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
    return [thread for thread in found if thread not in BEFORE]


BEFORE: list[threading.Thread] = []


@pytest.fixture(autouse=True)
def threads_of_others():
    BEFORE[:] = []
    BEFORE[:] = readers()


def test_an_unexpected_error_ends_the_batches_at_once_and_leaves_no_thread(reads, tmp_path):
    asked, _ = reads
    records = list_records(write_images(tmp_path, 20))
    batches = read_batches(records, dataclasses.replace(CONFIG, num_workers=1), 4, [])
    assert len(next(batches)) == 4
    with pytest.raises(MemoryError):
        next(batches)
    assert not readers() and len(asked) <= 8


def test_an_unexpected_error_ends_opening_too(reads, tmp_path):
    splits = {"train": list_records(write_images(tmp_path, 20))}
    with pytest.raises(MemoryError):
        open_datasets(splits, CONFIG, 0, tmp_path / "skipped_local_only.csv", quiet=True)
    assert not readers()


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_augmentation_depends_on_seed_epoch_and_index_alone(train):
    dataset, augmented = train
    other_seed = stream(dataset.records, seed=8).augmented()
    item = augmented[3, 2]["image"]
    augmented[0, 0], augmented[9, 5]
    assert torch.equal(augmented[3, 2]["image"], item)
    for different in (augmented[4, 2], augmented[2, 3], other_seed[3, 2], dataset[3, 2]):
        assert not torch.equal(different["image"], item)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_augmentation_does_not_depend_on_workers_or_order(train, workers):
    _, augmented = train
    keys = [(1, i) for i in (4, 0, 5, 2)]
    loader = DataLoader(augmented, batch_size=2, sampler=keys, num_workers=workers)
    loaded = torch.cat([batch["image"] for batch in loader])
    for key, image in zip(keys, loaded, strict=True):
        assert torch.equal(image, augmented[key]["image"])


def test_augmented_images_stay_in_range_and_close_to_the_plain_one(train):
    dataset, augmented = train
    still = stream(dataset.records, dataclasses.replace(CONFIG, flip=False)).augmented()
    assert all(augmented[epoch, 0]["image"].abs().max() <= 1 for epoch in range(20))
    assert max((still[epoch, 0]["image"] - dataset[0]["image"]).abs().mean() for epoch in range(20)) < 0.35


def test_augmentation_with_everything_at_zero_changes_nothing(train):
    dataset, _ = train
    names = ("rotate_degrees", "shift_share", "scale_share", "brightness", "contrast", "gamma", "noise_std")
    off = stream(dataset.records, dataclasses.replace(CONFIG, flip=False, **dict.fromkeys(names, 0))).augmented()
    torch.testing.assert_close(off[5, 1]["image"], dataset[1]["image"], atol=1e-6, rtol=0)


def test_a_mask_moves_with_its_image(tmp_path):
    Image.fromarray(np.kron([[0, 0, 0], [0, 255, 0]], np.ones((20, 20))).astype(np.uint8)).save(tmp_path / "a.png")
    grey_levels = dict.fromkeys(("brightness", "contrast", "gamma", "noise_std"), 0)
    config = dataclasses.replace(CONFIG, height=40, width=60, rotate_degrees=20, shift_share=0.2, **grey_levels)
    (entry,) = list_records(tmp_path)
    dataset = stream([dataclasses.replace(entry, mask=entry.path)], config).augmented()
    for epoch in range(10):
        item = dataset[epoch, 0]
        assert ((item["image"] > 0) != (item["mask"] > 0)).float().mean() < 0.03


def test_a_dataset_travels_to_a_spawned_worker(train):
    _, augmented = train
    image = augmented[0]["image"]
    assert torch.equal(pickle.loads(pickle.dumps(augmented))[0]["image"], image)


@pytest.mark.skipif(not BENCH.exists(), reason="the real radiographs are not beside the repository")
def test_the_real_benchmark_is_read_whole(tmp_path):
    splits = split_records(list_records(BENCH), CONFIG)
    data = open_datasets(splits, CONFIG, 0, tmp_path / "skipped_local_only.csv", quiet=True)
    assert {name: len(dataset) for name, dataset in data.items()} == {"train": 198, "val": 40, "test": 346}
    assert sum(record.label for record in splits["test"]) == 306
    assert all(data["test"][i]["mask"].any() for i, record in enumerate(splits["test"]) if record.mask)
