"""The rehearsal of a reader on corrupted validation normals: what it shows, and a run on the tiny pipeline."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline import ROOT, flags_of, run_benchmark, sources, table

sys.path.insert(0, str(ROOT / "benchmarks"))
import rehearsal
import tuning

from checks import UsageError
from config import Config


@pytest.fixture
def large(monkeypatch):
    """Things that the small images of tests can hold."""
    monkeypatch.setattr(rehearsal, "BANDS", ((20, 40), (40, 60)))
    monkeypatch.setattr(rehearsal, "BLOBS", ((32, 0.15), (64, 0.3)))


@pytest.mark.parametrize("radius", [0.02, 0.05])
def test_a_blob_has_about_the_area_of_its_radius(radius):
    areas = [
        (rehearsal.blob((200, 400), radius, np.random.default_rng(seed)) > 0.5).sum() / (np.pi * (200 * radius) ** 2)
        for seed in range(40)
    ]
    assert 0.8**2 * 0.9 < min(areas) and max(areas) < 1.25**2 * 1.1
    assert np.mean(areas) == pytest.approx(1, abs=0.15)


def test_every_normal_is_shown_with_one_thing_that_is_where_the_mask_says(large):
    normals = np.random.default_rng(0).uniform(-0.9, 0.9, (3, 64, 64)).astype(np.float32)
    shown = rehearsal.rehearsals(normals, seed=0)
    assert [case.family for case in shown].count("corruption") == len(rehearsal.BANDS)
    assert [case.family for case in shown].count("blob") == len(rehearsal.BLOBS)
    for case in shown:
        changed = np.abs(case.images - normals)
        assert case.images.shape == case.masks.shape == normals.shape
        assert all(mask.any() for mask in case.masks)
        inside = np.mean([change[mask].mean() for change, mask in zip(changed, case.masks, strict=True)])
        assert inside > 10 * changed[~case.masks].mean()


def test_the_same_things_are_shown_to_every_reader(large):
    normals = np.random.default_rng(0).uniform(-0.9, 0.9, (2, 64, 64)).astype(np.float32)
    first, second = (rehearsal.rehearsals(normals, seed=3) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.images, other.images)
    assert not np.array_equal(first[0].images, rehearsal.rehearsals(normals, seed=4)[0].images)


@pytest.mark.parametrize(("skill", "auroc"), [(1.0, 1.0), (0.0, 0.5), (-1.0, 0.0)])
def test_who_sees_what_was_put_there_is_told_from_who_does_not(skill, auroc, large, monkeypatch):
    """A reader that answers with the very change (and a little noise), with noise alone, or with the opposite."""
    normals = np.zeros((14, 64, 64), np.float32)
    random = np.random.default_rng(0)
    beside = random.normal(0, 0.01, (1000, 1, 64, 64)).astype(np.float32)

    def verdicts(model, reader, images, config, what="normals"):
        own = beside[: len(images)] if what == "normals" else random.normal(0, 0.01, (len(images), 1, 64, 64))
        signal = skill * np.abs(images - normals)[:, None] if skill >= 0 else -0.05 * (what != "normals")
        return torch.from_numpy(own + signal).half()

    monkeypatch.setattr(rehearsal, "verdicts", verdicts)
    rows = rehearsal.rehearse(None, None, normals, Config(), range(len(normals)))
    means = {row[0]: row for row in rows if row[1] == "mean"}
    assert float(means["blob"][3]) == pytest.approx(auroc, abs=0.2)
    assert (float(means["blob"][4]) > 0.9) == (skill == 1)
    assert len(rows) == len(rehearsal.BANDS) + len(rehearsal.BLOBS) + 2


def test_a_rehearsal_trains_the_reader_and_writes_its_table(large, examined, monkeypatch, capsys, tmp_path):
    flags = flags_of(tmp_path, examined.phantoms, *sources("inference", examined), "--inference.method", "reader")
    few = (
        "--reader.tuned-steps",
        "0",
        "--reader.steps",
        "2",
        "--reader.copies",
        "1",
        "--reader.features",
        "image",
        "--reader.magnification",
        "1",
    )
    run_benchmark(rehearsal.main, monkeypatch, *flags, *few)
    rows = table(Path(tmp_path) / "phase4_inference" / "rehearsal.csv")
    assert [row["family"] for row in rows[-2:]] == ["corruption", "blob"]
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("auroc", "pixel_ap"))
    assert "wrote" in capsys.readouterr().out


def test_the_tuned_backbone_is_rehearsed_alone(large, examined, monkeypatch, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    flags = flags_of(tmp_path, examined.phantoms, *sources("inference", examined))
    run_benchmark(tuning.main, monkeypatch, *flags, "--reader.tuned-steps", 2)
    rows = table(Path(tmp_path) / "phase4_inference" / "tuning.csv")
    assert [row["family"] for row in rows[-2:]] == ["corruption", "blob"]
    assert not list(tmp_path.rglob("reader.pt"))  # nothing else was trained


def test_too_few_normals_are_told_before_anything_is_trained(examined, monkeypatch, tmp_path):
    flags = flags_of(tmp_path, examined.phantoms, *sources("inference", examined))
    few = SimpleNamespace(images=np.zeros((3, 8, 8), np.float32), patients=["A", "A", "B"])
    monkeypatch.setattr(rehearsal, "read_normals", lambda *given: few)
    monkeypatch.setattr(rehearsal, "reader_of", lambda *given: pytest.fail("trained before it was looked"))
    with pytest.raises(UsageError, match="inference.method reader needs those of 3 patients and there are 2"):
        run_benchmark(rehearsal.main, monkeypatch, *flags)
