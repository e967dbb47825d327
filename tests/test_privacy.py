"""Nothing about a patient leaves by accident: canaries in every place that may name one, and a search for them."""

import csv
import io
import json
import os
import socket
import stat
import zipfile

import numpy as np
import pydicom
import pytest
import torch
from pipeline import TRAINING
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_VM
from pydicom.uid import ExplicitVRLittleEndian

from config import Config
from files import defused, write_csv
from radiographs.reading import read_radiograph
from runtime import shareable

CANARY = "Kanarienvogel"
MAY_LEAD_BACK = ("*_local_only.csv", "latents_*.pkl")  # what the README says must stay where it is
TEXT = {"LO", "SH", "PN", "LT", "ST", "UT", "UC", "AE"}


def planted(picture, number):
    """A radiograph as DICOM with the canary in every text element that the standard knows of a small file."""
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    pixels = np.asarray(picture, np.uint16)
    dataset.Rows, dataset.Columns, dataset.PixelData = *pixels.shape, pixels.tobytes()
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    for name in ("PixelPaddingValue", "RescaleSlope", "RescaleIntercept"):
        if name in dataset:
            del dataset[name]
    count = 0
    for element in dataset.iterall():
        if element.VR in TEXT and element.tag.group > 2 and not element.tag.is_private:
            element.value = f"{CANARY}{count % 100}"[:16] if element.VR in ("SH", "AE") else f"{CANARY}^{count}"
            count += 1
    for keyword in ("PatientName", "PatientID", "PatientAddress", "InstitutionName", "ReferringPhysicianName"):
        setattr(dataset, keyword, f"{CANARY}^{number}")
    assert count > 10 and dictionary_VM(0x00100010) == "1"
    return dataset


@pytest.fixture(scope="module")
def clinic(made, tmp_path_factory):
    """The phantoms as a clinic might hand them over: the canary in data.root, folders, file names and headers."""
    root = tmp_path_factory.mktemp(CANARY)
    rows = []
    with open(made.phantoms / "manifest.csv", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            dataset = planted(read_radiograph(made.phantoms / row["image"]).pixels, number)
            path = root / f"{CANARY}_{number}" / f"{CANARY}.dcm"
            path.parent.mkdir()
            dataset.save_as(path)
            row |= {"image": path.relative_to(root).as_posix(), "mask": "", "patient": f"{CANARY}, Anna {number}"}
            rows.append({name: row[name] for name in ("image", "split", "label", "kind", "patient")})
    next(iter(root.glob("*_3"))).joinpath(f"{CANARY}.dcm").write_bytes(b"unreadable")
    with open(root / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return root


def contents(path):
    """The bytes of a file, and of what is packed into it."""
    raw = path.read_bytes()
    yield raw
    if zipfile.is_zipfile(io.BytesIO(raw)):
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield archive.read(name)


@pytest.mark.filterwarnings("ignore")
def test_no_canary_is_found_in_what_all_phases_wrote_and_said(clinic, call, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    more = ["--data.max-bad-share", 0.3, "--runtime.wandb", "offline"]
    own = {
        "extract_latents": ["--latent.vae-checkpoint", tmp_path / "phase1_vae/checkpoint_best.pt"],
        "train_flowdiff": [
            *("--flowdiff.vae-checkpoint", tmp_path / "phase1_vae/checkpoint_best.pt"),
            *("--flowdiff.latents", tmp_path / "phase2_latents"),
        ],
        "inference": [
            *("--inference.vae-checkpoint", tmp_path / "phase1_vae/checkpoint_best.pt"),
            *("--inference.flow-checkpoint", tmp_path / "phase3_flowdiff/checkpoint_best.pt"),
        ],
    }
    for script in (*TRAINING, "inference"):
        result = call(script, *own.get(script, ()), *more, data=clinic)
        assert result.code == 0, result.error
        said = "\n".join(line for line in result.out.splitlines() if not line.startswith("next: "))  # what was typed
        assert CANARY not in said + result.error
    seen, private = 0, []
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        assert CANARY not in str(path.relative_to(tmp_path))
        if any(path.match(name) for name in MAY_LEAD_BACK):
            private.append(path.name)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            continue
        seen += 1
        for content in contents(path):
            assert CANARY.encode() not in content and CANARY.encode("utf-16-le") not in content, path
    assert seen > 40 and any("wandb" in str(path) for path in tmp_path.rglob("*.wandb"))
    assert {"lookup_local_only.csv", "latents_train.pkl", "skipped_local_only.csv"} <= set(private)
    assert CANARY in (tmp_path / "phase4_inference/lookup_local_only.csv").read_text()  # it would have been found


def test_a_config_that_is_shared_says_nothing_of_places():
    config = Config()
    told = shareable(config)
    assert told["data"]["root"] == told["data"]["test"] == ""
    assert told["latent"]["vae_checkpoint"] == "checkpoint_best.pt" and told["vae"]["pretrained"] == "sd-vae-ft-mse"
    assert "/" not in json.dumps(told) and told["flowdiff"]["total_steps"] == config.flowdiff.total_steps


def test_no_phase_opens_a_connection(call, made, monkeypatch, tmp_path):
    """Local weights, and wandb off."""

    def refuse(*given):
        pytest.fail(f"a connection to {given[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for script in (*TRAINING, "inference"):
        assert call(script, "--inference.figures", 1).code == 0
    assert torch.cuda.is_available() or (tmp_path / "phase4_inference/scores.csv").is_file()


@pytest.mark.parametrize("cell", ["=cmd|'/c calc'!A1", "+1+cmd", "-2+3", "@SUM(A1)", "\tx", "\r=1", "\n=1"])
def test_no_cell_is_a_formula(cell, tmp_path):
    assert defused(cell) == f"'{cell}"
    write_csv(tmp_path / "x.csv", ["kind"], [[cell]])
    with open(tmp_path / "x.csv", newline="") as file:
        assert list(csv.reader(file)) == [["kind"], [f"'{cell}"]]


@pytest.mark.parametrize("cell", ["-0.5", "+3", "1e-3", "-inf", "cyst", "", 0, -1.5, "a=b"])
def test_numbers_and_words_stay_as_they_are(cell):
    assert defused(cell) == cell


def test_results_follow_the_umask_and_what_leads_back_does_not(tmp_path):
    before = os.umask(0o027)
    try:
        write_csv(tmp_path / "scores.csv", ["score"], [[1]])
        write_csv(tmp_path / "lookup_local_only.csv", ["source"], [["x"]], private=True)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"scores.csv": 0o640, "lookup_local_only.csv": 0o600}
