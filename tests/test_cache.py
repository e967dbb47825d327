"""Decoded radiographs on disk: equal to the last bit, never another file's, never half written, nobody's name."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from pipeline import ROOT
from test_manifest import write_images, write_manifest

import dataset
import decoded
from checks import UsageError
from config import DataConfig
from dataset import kept_sample, open_datasets, read_batches, read_sample
from radiographs.manifest import list_records
from radiographs.reading import ImageReadError


def config_in(folder, **more):
    return DataConfig(height=32, width=48, num_workers=2, cache_folder=str(folder / "cache"), **more)


def anew(config):
    """The cache as another process finds it."""
    decoded._opened.cache_clear()
    return decoded.cache_of(config)


def tick():
    """What is written from here on has a later time of change, whatever the file system's clock."""
    time.sleep(0.05)


@pytest.fixture(autouse=True)
def patient_clock(monkeypatch):
    """Files that a test has just written count as settled."""
    monkeypatch.setattr(decoded, "SETTLED", -1)


@pytest.fixture
def decodes(monkeypatch):
    """The names of the files that were decoded."""
    names, read = [], dataset.read_radiograph

    def reading(path):
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(dataset, "read_radiograph", reading)
    return names


@pytest.fixture
def records(tmp_path):
    """Four radiographs, one of them with a mask and one of another size."""
    folder = write_images(tmp_path / "data", 4)
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (70, 50), np.uint16)).save(folder / "003.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[7, 31] = 255
    Image.fromarray(mask).save(folder / "m.png")
    rows = [{"image": f"00{i}.png", "mask": "m.png" if i == 1 else "", "label": str(int(i == 1))} for i in range(4)]
    return list_records(write_manifest(folder, rows))


def same(one, other):
    """Whether two samples are equal to the last bit."""
    masks = [None if sample.mask is None else (sample.mask.dtype, sample.mask.tobytes()) for sample in (one, other)]
    arrays = [(s.image.dtype, s.image.shape, s.image.tobytes(), s.fingerprint.tobytes()) for s in (one, other)]
    plain = [(s.original_shape, s.digest) for s in (one, other)]
    return masks[0] == masks[1] and arrays[0] == arrays[1] and plain[0] == plain[1]


# --- a hit is a miss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize(("times", "finest"), [(1, None), (2, None), (2, (40, 50))])
def test_a_hit_and_a_miss_are_what_read_sample_gives_to_the_last_bit(fit, times, finest, records, tmp_path, decodes):
    config = config_in(tmp_path, fit=fit)
    expected = [read_sample(record, config, times, finest) for record in records]
    for _ in range(2):
        anew(config)
        found = [kept_sample(record, config, times, finest) for record in records]
        assert all(map(same, found, expected))
    assert len(decodes) == 2 * len(records)


def test_what_may_be_written_into_stays_so(records, tmp_path):
    config = config_in(tmp_path)
    kept_sample(records[1], config).image[:] = 9
    kept_sample(records[1], config).image[:] = 9
    assert same(kept_sample(records[1], config), read_sample(records[1], config))


def test_later_epochs_phases_and_runs_decode_nothing(records, tmp_path, decodes, capsys):
    config = config_in(tmp_path, cache_gb=0)
    for told in ("0 of them", "4 of them"):
        anew(config)
        data = open_datasets({"train": records}, config, 0, tmp_path / "skipped.csv")["train"]
        [data[epoch, index] for epoch in range(2) for index in range(4)]
        assert f"{told} from {tmp_path / 'cache'}" in capsys.readouterr().out
    assert len(list(read_batches(records, config, 3, []))) == 2
    assert sorted(decodes) == [record.path.name for record in records]


def test_phase_2_decodes_nothing_that_phase_1_has_decoded_and_its_latents_are_the_same(call, made, tmp_path, decodes):
    assert call("train_vae", "--vae.steps", 1).code == 0 and decodes
    decodes.clear()
    for cache_gb in (0, 4):  # of memory
        assert call("extract_latents", "--data.cache-gb", cache_gb, "--runtime.resume", False).code == 0 and not decodes
        for name in ("latents_train.npy", "latents_val.npy"):
            assert (tmp_path / "phase2_latents" / name).read_bytes() == (made.phase2 / name).read_bytes()


def test_the_size_zero_switches_it_off(records, tmp_path, decodes):
    config = config_in(tmp_path, cache_disk_gb=0)
    assert same(kept_sample(records[0], config), kept_sample(records[0], config))
    assert len(decodes) == 2 and not (tmp_path / "cache").exists()


# --- what is stale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"height": 40}, {"fit": "pad"}, {"percentile_low": 2.0}, {"percentile_high": 95.0}],
    ids=lambda change: next(iter(change)),
)
def test_another_preprocessing_is_another_sample(change, records, tmp_path):
    config = config_in(tmp_path)
    other = dataclasses.replace(config, **change)
    first = kept_sample(records[3], config)
    assert same(kept_sample(records[3], other), read_sample(records[3], other))
    assert not same(kept_sample(records[3], other), first) and same(kept_sample(records[3], config), first)


def test_a_file_that_changed_is_read_anew_though_its_size_and_time_are_the_old_ones(records, tmp_path):
    config, path = config_in(tmp_path), records[0].path
    pixels = np.random.default_rng(1).integers(0, 255, (40, 60), np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)
    before, state = kept_sample(records[0], config), path.stat()
    tick()
    Image.fromarray(pixels[::-1].copy()).save(path, compress_level=0)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size and path.stat().st_mtime_ns == state.st_mtime_ns
    found = kept_sample(records[0], config)
    assert same(found, read_sample(records[0], config)) and found.digest != before.digest


def test_a_mask_that_changed_is_read_anew(records, tmp_path):
    config = config_in(tmp_path)
    before = kept_sample(records[1], config)
    tick()
    Image.fromarray(np.full((40, 60), 255, np.uint8)).save(records[1].mask)
    assert kept_sample(records[1], config).mask.all() and not before.mask.all()


def test_a_file_that_was_moved_is_known_by_its_content(records, tmp_path, decodes):
    config = config_in(tmp_path)
    kept_sample(records[0], config)
    moved = dataclasses.replace(records[0], path=shutil.copy(records[0].path, tmp_path / "moved.png"))
    anew(config)
    assert same(kept_sample(moved, config), kept_sample(records[0], config)) and len(decodes) == 1


def test_a_file_that_has_just_changed_is_trusted_by_its_content_alone(records, tmp_path, monkeypatch, decodes):
    hashed = []
    monkeypatch.setattr(decoded, "sha256", lambda path, whole=decoded.sha256: hashed.append(path) or whole(path))
    config = config_in(tmp_path)
    for settled, looks in ((3600 * 10**9, 2), (-1, 1), (-1, 0)):
        monkeypatch.setattr(decoded, "SETTLED", settled)
        kept_sample(records[0], config)
        assert len(hashed) == looks, "before and after it is decoded, once more to be known, and then no more"
        hashed.clear()
    assert len(decodes) == 1


def test_a_file_that_changes_while_it_is_decoded_is_not_kept(records, tmp_path, monkeypatch):
    config, read = config_in(tmp_path), dataset.read_radiograph

    def changing(path):
        found = read(path)
        tick()
        shutil.copy(records[3].path, path)
        return found

    monkeypatch.setattr(dataset, "read_radiograph", changing)
    kept_sample(records[0], config)
    monkeypatch.setattr(dataset, "read_radiograph", read)
    assert same(kept_sample(records[0], config), read_sample(records[3], config))


def test_a_file_that_vanished_or_cannot_be_read_is_the_error_it_always_was(records, tmp_path):
    config = config_in(tmp_path)
    kept_sample(records[0], config)
    tick()
    records[0].path.unlink()
    records[2].path.write_text("<html>")
    for record, reason in ((records[0], "No such file"), (records[2], "neither a DICOM"), (records[2], "neither a")):
        with pytest.raises(ImageReadError, match=reason):
            kept_sample(record, config)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageReadError, match="a pipe or a device"):
        kept_sample(dataclasses.replace(records[0], path=tmp_path / "pipe.png"), config)


def test_another_version_of_what_decodes_decodes_anew(records, tmp_path, monkeypatch, decodes):
    config = config_in(tmp_path)
    kept_sample(records[0], config)
    monkeypatch.setattr(decoded.metadata, "distributions", lambda name: [])
    decoded.shelf_name.cache_clear()
    anew(config)
    kept_sample(records[0], config)
    decoded.shelf_name.cache_clear()
    assert len(decodes) == 2


# --- what is damaged, deleted or half written -------------------------------------------------------------------------


def rows_of(tmp_path):
    (path,) = (tmp_path / "cache").glob("*/rows.npy")
    return path


def flip(path, place):
    with open(path, "r+b") as file:
        place = file.seek(place, os.SEEK_SET if place >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


DAMAGE = {  # the whole of a row is 1024 + 104 + 48 * 32 * (4 + 1 / 8) bytes
    "a bit of an image": lambda folder: flip(folder / "rows.npy", 1024 + 3000),
    "a bit of a mask": lambda folder: flip(folder / "rows.npy", -1),
    "rows cut short": lambda folder: os.truncate(folder / "rows.npy", 1024 + 7000),
    "rows gone": lambda folder: (folder / "rows.npy").unlink(),
    "a bit of the index": lambda folder: flip(folder / "index.bin", 30),
    "an index of rubbish": lambda folder: (folder / "index.bin").write_bytes(os.urandom(28 * 4)),
    "an index cut short": lambda folder: os.truncate(folder / "index.bin", 50),
    "an index gone": lambda folder: (folder / "index.bin").unlink(),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_is_made_anew_and_said_in_one_line(what, records, tmp_path, decodes, capsys):
    config = config_in(tmp_path)
    expected = [read_sample(record, config) for record in records]
    [kept_sample(record, config) for record in records]
    DAMAGE[what](rows_of(tmp_path).parent)
    for _ in range(2):
        anew(config)
        assert all(same(kept_sample(record, config), plain) for record, plain in zip(records, expected, strict=True))
    told = 0 if what == "an index cut short" else 1  # as a killed writer leaves it
    assert capsys.readouterr().out.count("damaged: it is made anew") == told
    mended = len(decodes)
    assert [kept_sample(record, config) for record in records] and len(decodes) == mended


def test_half_a_row_and_half_a_record_of_a_killed_writer_are_written_over(records, tmp_path, decodes):
    config = config_in(tmp_path)
    kept_sample(records[0], config)
    folder, size = rows_of(tmp_path).parent, rows_of(tmp_path).stat().st_size
    for name in ("rows.npy", "index.bin"):
        with open(folder / name, "ab") as file:
            file.write(b"\x01" * 17)
    anew(config)
    assert same(kept_sample(records[1], config), read_sample(records[1], config))
    assert same(kept_sample(records[0], config), read_sample(records[0], config)) and decodes.count("000.png") == 2
    assert rows_of(tmp_path).stat().st_size == size + (size - 1024) and (folder / "index.bin").stat().st_size == 2 * 28


def test_the_rows_are_an_npy_that_can_be_mapped(records, tmp_path):
    config = config_in(tmp_path)
    samples = [kept_sample(record, config) for record in records]
    rows = np.load(rows_of(tmp_path), mmap_mode="r", allow_pickle=False)
    np.testing.assert_array_equal(rows["image"], [sample.image for sample in samples])


READ = """
import itertools, sys, time
import dataset
from dataset import open_datasets
from pathlib import Path
from config import DataConfig
from radiographs.manifest import list_records
root, cache, size, most = sys.argv[1:]
read, turns = dataset.read_radiograph, itertools.count()
dataset.read_radiograph = lambda path: read(path) if next(turns) < int(most) else time.sleep(3600)
config = DataConfig(height=int(size), width=int(size), num_workers=4, cache_folder=cache)
open_datasets({"train": list_records(root)}, config, 0, Path(cache) / "skipped.csv")
"""


def reading(root, cache, size, most=10**6):
    """A process that reads all radiographs of a folder, or hangs after so many."""
    command = [sys.executable, "-c", READ, str(root), str(cache), str(size), str(most)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_filling_that_was_killed_goes_on_and_nothing_of_it_is_wrong(tmp_path, decodes):
    records, cache = list_records(write_images(tmp_path / "data", 60, (400, 500))), tmp_path / "cache"
    config = DataConfig(height=256, width=256, num_workers=2, cache_folder=str(cache))
    process, deadline = reading(tmp_path / "data", cache, 256, most=40), time.monotonic() + 600
    while not any(path.stat().st_size > 5 * 28 for path in cache.glob("*/index.bin")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = {position: sample for batch in read_batches(records, config, 8, []) for position, sample in batch}
    assert all(same(found[i], read_sample(record, config)) for i, record in enumerate(records))
    assert 0 < len(decodes) - len(records) < len(records), "some rows of the killed run are there, not all"


def test_two_processes_share_a_cache(tmp_path, decodes):
    records, cache = list_records(write_images(tmp_path / "data", 40)), tmp_path / "cache"
    both = [reading(tmp_path / "data", cache, size=64) for _ in range(2)]
    assert [process.communicate(timeout=600)[0].count("40 radiographs read") for process in both] == [1, 1]
    config = DataConfig(height=64, width=64, num_workers=2, cache_folder=str(cache))
    found = [sample for batch in read_batches(records, config, 8, []) for _, sample in batch]
    assert not decodes and decoded.cache_of(config).hits == 40
    assert all(same(sample, read_sample(record, config)) for sample, record in zip(found, records, strict=True))
    assert len(np.load(rows_of(tmp_path), mmap_mode="r")) == 40


# --- how much, where, whose ------------------------------------------------------------------------------------------


def limited(tmp_path, rows, **more):
    """A config whose cache has room for so many rows of 32 x 48."""
    row = 32 * 48 * 4 + 32 * 48 // 8 + 104
    return config_in(tmp_path, cache_disk_gb=(1024 + rows * row + 1) / 2**30, **more)


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.glob("*/rows.npy"))


def test_it_grows_to_its_size_and_says_so(records, tmp_path, decodes, capsys):
    config = limited(tmp_path, 2)
    for _ in range(3):
        assert all(same(kept_sample(record, config), read_sample(record, config)) for record in records)
    assert len(decodes) == 12 + 2 + 3 * 2 and bytes_in(tmp_path / "cache") <= config.cache_disk_gb * 2**30
    assert capsys.readouterr().out.count("cache is full") == 1


def test_rows_that_this_run_has_no_use_for_give_way(records, tmp_path, decodes):
    config = limited(tmp_path, 2)
    [kept_sample(record, config) for record in records[:2]]
    anew(config)
    for _ in range(2):
        assert all(same(kept_sample(record, config), read_sample(record, config)) for record in records[2:])
    assert len(decodes) == 2 + 2 + 4 and bytes_in(tmp_path / "cache") <= config.cache_disk_gb * 2**30
    assert same(kept_sample(records[0], config), read_sample(records[0], config))


def test_preprocessings_that_nobody_uses_any_more_give_way_first(records, tmp_path):
    config = limited(tmp_path, 5)
    old, kept = (dataclasses.replace(config, percentile_low=low) for low in (1.0, 2.0))
    for each in (old, kept):
        anew(each)
        [kept_sample(record, each) for record in records[:2]]
    [kept_sample(record, config) for record in records]
    assert len(list((tmp_path / "cache").glob("*/rows.npy"))) == 2
    anew(kept).hits = 0
    [kept_sample(record, kept) for record in records[:2]]
    assert decoded.cache_of(kept).hits == 2


def test_what_another_process_uses_stays(records, tmp_path):
    config = limited(tmp_path, 2)
    [kept_sample(record, config) for record in records[:2]]
    theirs = decoded.cache_of(config)
    anew(config)
    [kept_sample(record, config) for record in records[2:]]
    [kept_sample(record, dataclasses.replace(config, fit="pad")) for record in records]
    assert all(shelf.get(key) for shelf in theirs.shelves.values() for key in shelf.index.known)


def test_a_size_that_was_lowered_is_kept_to(records, tmp_path):
    [kept_sample(record, limited(tmp_path, 4)) for record in records[:3]]
    anew(limited(tmp_path, 4))
    [kept_sample(record, limited(tmp_path, 1)) for record in records]
    assert bytes_in(tmp_path / "cache") <= limited(tmp_path, 1).cache_disk_gb * 2**30


def test_a_disk_that_is_nearly_full_is_left_to_others(records, tmp_path, small_disk, capsys):
    config = dataclasses.replace(config_in(tmp_path), cache_folder=str(small_disk / "cache"))
    assert all(same(kept_sample(record, config), read_sample(record, config)) for record in records)
    assert not list((small_disk / "cache").glob("*/rows.npy")) and capsys.readouterr().out.count("is full") == 1


def test_a_disk_that_is_full_and_a_folder_that_cannot_be_made_cost_the_cache_and_no_more(
    records, tmp_path, small_disk, capsys, monkeypatch
):
    monkeypatch.setattr(decoded, "LEFT_FREE", -(2**40))
    (tmp_path / "file").write_text("")
    for folder, why in ((small_disk / "cache", "its disk is full"), (tmp_path / "file" / "cache", "File exists")):
        config = dataclasses.replace(config_in(tmp_path, fit="pad"), cache_folder=str(folder), height=200, width=200)
        assert all(same(kept_sample(record, config), read_sample(record, config)) for record in records * 2)
        assert capsys.readouterr().out.count(f"cannot be written ({why})") == 1


def test_it_is_its_owners_alone_and_names_nobody(tmp_path):
    name = "Kanarienvogel"
    folder = write_images(tmp_path / "data" / name, 1).parent
    (folder / name / "000.png").rename(folder / name / f"{name}.png")
    (tmp_path / "cache").mkdir(mode=0o777)
    kept_sample(list_records(folder)[0], config_in(tmp_path))
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        assert name not in path.name and (path.is_dir() or name.encode() not in path.read_bytes())


def test_a_process_that_is_forked_off_shares_no_lock(records, tmp_path, decodes):
    config = config_in(tmp_path)
    expected = kept_sample(records[0], config)
    with decoded.cache_of(config).lock, multiprocessing.get_context("fork").Pool(1) as pool:
        assert same(pool.apply_async(kept_sample, (records[0], config)).get(60), expected)


def test_a_cache_that_is_removed_under_a_run_is_made_anew(records, tmp_path):
    config = config_in(tmp_path)
    expected = [kept_sample(record, config) for record in records]
    shutil.rmtree(tmp_path / "cache")
    for _ in range(2):
        assert all(same(kept_sample(record, config), plain) for record, plain in zip(records, expected, strict=True))
    assert len(np.load(rows_of(tmp_path), mmap_mode="r")) == 4


def test_a_cache_that_may_not_be_written_to_can_be_read(records, tmp_path, decodes, capsys):
    config = config_in(tmp_path)
    expected = [kept_sample(record, config) for record in records[:3]]
    for path in (rows_of(tmp_path).parent / ".use", tmp_path / "cache" / ".lock"):
        path.unlink()
        path.mkdir()  # nobody, the superuser neither, opens that to write
    anew(config)
    assert all(same(kept_sample(record, config), plain) for record, plain in zip(records, expected, strict=False))
    assert len(decodes) == 3 and kept_sample(records[3], config) and len(decodes) == 4
    assert capsys.readouterr().out.count("cannot be written (Is a directory)") == 1


def test_a_folder_without_a_name_is_refused():
    with pytest.raises(UsageError, match="data.cache_folder is empty"):
        DataConfig(cache_folder="")
