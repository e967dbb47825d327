"""From latents on disk to standardized z and back, and the file that does not belong."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import flowdiff_batch
from checks import UsageError
from config import Config, DataConfig, FlowDiffTrainingConfig
from extract_latents import channel_statistics, find_outliers
from files import sha256, write_sealed_json
from flowdiff_batch import latent_batches
from latent_dataset import FORMAT, LatentDataset, LatentStandard, read_latents_json

ROWS = np.random.default_rng(0).normal([[[-3.0]], [[0.5]]], [[[0.2]], [[7.0]]], (5, 2, 4, 6)).astype(np.float32)
STANDARD = LatentStandard(mean=(-3.0, 0.5), std=(0.2, 7.0))


@pytest.fixture
def folder(tmp_path):
    """What phase 2 leaves behind, with three validation rows."""
    np.save(tmp_path / "latents_train.npy", ROWS)
    np.save(tmp_path / "latents_val.npy", ROWS[:3])
    description = {"format": FORMAT, "rows": {"train": 5, "val": 3}, "shape": [2, 4, 6]}
    description |= {"mean": STANDARD.mean, "std": STANDARD.std}
    description |= {"vae_sha256": "", "preprocessing": {}, "split": {}, "members": {}}
    description["sha256"] = {split: sha256(tmp_path / f"latents_{split}.npy") for split in ("train", "val")}
    write_sealed_json(tmp_path / "latents.json", description)
    return tmp_path


def test_standardizing_has_an_exact_inverse():
    raw = torch.from_numpy(ROWS).double()
    torch.testing.assert_close(STANDARD.raw(STANDARD.standardize(raw)), raw, rtol=0, atol=4e-15)
    torch.testing.assert_close(STANDARD.raw(STANDARD.standardize(raw[0])), raw[0], rtol=0, atol=4e-15)


def test_standardized_latents_have_mean_zero_and_variance_one():
    mean, std = channel_statistics(ROWS)
    z = LatentStandard(tuple(mean), tuple(std)).standardize(torch.from_numpy(ROWS).double())
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(2, dtype=torch.float64), rtol=1e-10, atol=0)


@pytest.mark.parametrize("rows_at_once", [1, 2, 256])
def test_channel_statistics_are_numpys_however_they_are_cut(rows_at_once):
    mean, std = channel_statistics(ROWS, rows_at_once)
    np.testing.assert_allclose(mean, ROWS.mean((0, 2, 3), dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(std, ROWS.std((0, 2, 3), dtype=np.float64), rtol=1e-8)


def test_rows_come_out_standardized_by_row_or_by_epoch_and_row(folder):
    data = LatentDataset(folder, "val")
    assert len(data) == 3
    mean, std = (torch.tensor(values).view(2, 1, 1) for values in (STANDARD.mean, STANDARD.std))
    expected = (torch.from_numpy(ROWS[2]) - mean) / std
    for key in (2, (7, 2)):
        torch.testing.assert_close(data[key], expected)


def test_the_file_on_disk_is_mapped_not_read(folder):
    assert isinstance(LatentDataset(folder, "train").raw, np.memmap)


def test_a_batch_written_to_leaves_the_file_as_it_was(folder):
    data = LatentDataset(folder, "train")
    data[0].zero_()
    np.testing.assert_array_equal(np.load(folder / "latents_train.npy"), ROWS)


@pytest.mark.parametrize("name", ["latents.json", "latents_train.npy"])
def test_a_missing_file_names_phase_2(folder, name):
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"{name} is missing: run python extract_latents.py first"):
        LatentDataset(folder, "train")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-40])


def garbage(path):
    path.write_bytes(b"not an array at all")


def pickled_objects(path):
    np.save(path, np.array([{}], dtype=object))


@pytest.mark.parametrize(
    "damage",
    [cut_short, garbage, pickled_objects, lambda path: path.write_bytes(b"")],
    ids=["cut", "garbage", "pickled", "empty"],
)
def test_a_damaged_file_names_phase_2(folder, damage):
    damage(folder / "latents_train.npy")
    with pytest.raises(UsageError, match="latents_train.npy is damaged .*: run python extract_latents.py again"):
        LatentDataset(folder, "train")


@pytest.mark.parametrize(
    "rows", [ROWS[:4], ROWS[:, :1], ROWS[..., :3]], ids=["fewer rows", "fewer channels", "narrower"]
)
def test_a_file_of_another_shape_than_described_names_phase_2(folder, rows):
    np.save(folder / "latents_train.npy", rows)
    with pytest.raises(
        UsageError, match=r"has shape .*latents.json says \(5, 2, 4, 6\): run python extract_latents.py again"
    ):
        LatentDataset(folder, "train")


def test_latents_of_another_run_of_phase_2_are_refused(folder):
    np.save(folder / "latents_train.npy", ROWS + 1)
    with pytest.raises(UsageError, match="not the file latents.json describes: run python extract_latents.py again"):
        LatentDataset(folder, "train")


def test_a_description_of_something_else_names_phase_2(folder):
    (folder / "latents.json").write_text("[]")
    with pytest.raises(UsageError, match="has format None.*run python extract_latents.py again"):
        read_latents_json(folder)
    write_sealed_json(folder / "latents.json", {"format": FORMAT})
    with pytest.raises(UsageError, match="lacks vae_sha256.*run python extract_latents.py again"):
        read_latents_json(folder)


@pytest.mark.parametrize("name", ["mean", "rows", "vae_sha256", "content_sha256"])
def test_a_description_in_which_one_value_changed_names_phase_2(folder, name):
    """A digit of a mean would shift every latent, and nothing else would look wrong."""
    description = json.loads((folder / "latents.json").read_text())
    description[name] = [-3.0, 0.51] if name == "mean" else "0"
    (folder / "latents.json").write_text(json.dumps(description))
    with pytest.raises(UsageError, match=r"damaged \(its content is not what was written\).*extract_latents.py again"):
        read_latents_json(folder)


def test_a_description_of_another_format_names_phase_2(folder):
    (folder / "latents.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(
        UsageError, match=f"has format 1, this code reads {FORMAT}: run python extract_latents.py again"
    ):
        read_latents_json(folder)


def test_a_damaged_description_names_phase_2(folder):
    (folder / "latents.json").write_text('{"rows": ')
    with pytest.raises(UsageError, match="extract_latents.py"):
        read_latents_json(folder)


def latents(**planted):
    """Latents of 40 training and 10 validation images, some of them spoilt."""
    random = np.random.default_rng(1)
    rows = {"train": random.normal(size=(40, 4, 8, 8)), "val": random.normal(size=(10, 4, 8, 8))}
    for split, change in planted.items():
        change(rows[split])
    return rows


def test_a_planted_outlier_is_named_and_nothing_else():
    rows = latents(val=lambda part: part[3].__iadd__(5.0), train=lambda part: part[7, 2].__imul__(9.0))
    found = find_outliers(rows, limit=8.0)
    assert sorted((entry["split"], entry["row"]) for entry in found) == [("train", 7), ("val", 3)]
    assert all(entry["deviations"] > 8 for entry in found)


def test_ordinary_latents_have_no_outliers():
    assert find_outliers(latents(), limit=8.0) == []


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_not_finite_are_refused_by_file_name(value):
    rows = latents(val=lambda part: part[4, 0].__setitem__((0, 0), value))
    with pytest.raises(UsageError, match=r"1 latents are not finite, such as row 4 of latents_val: .* latents_val.pkl"):
        find_outliers(rows, limit=8.0)


@pytest.mark.parametrize("rows_at_once", [2, 1024])
def test_latents_on_a_device_are_the_rows_to_the_bit(folder, rows_at_once):
    data = LatentDataset(folder, "train")
    rows = torch.stack([data[row] for row in range(len(data))])
    assert torch.equal(data.on(torch.device("cpu"), rows_at_once), rows)


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
def test_batches_from_a_device_are_those_of_the_disk_wherever_they_fit(folder, gigabytes, monkeypatch):
    data, alone = LatentDataset(folder, "train"), SimpleNamespace(device=torch.device("cpu"))
    alone.process_index, alone.num_processes = 0, 1
    config = Config(data=DataConfig(num_workers=1), flowdiff=FlowDiffTrainingConfig(batch_size=3, device_gb=gigabytes))
    read = latent_batches(data, (1, 5), config, alone)
    assert read.num_workers == (gigabytes == 0)  # few are read without the help of others
    expected = torch.stack(list(read))
    monkeypatch.setattr(flowdiff_batch, "RESIDENT", ("cpu",))
    found = latent_batches(data, (1, 5), config, alone)
    assert isinstance(found, DataLoader) == (gigabytes == 0)
    assert torch.equal(torch.stack(list(found)), expected) and expected.shape == (4, 3, 2, 4, 6)
