"""What a user gets wrong ends in one line that starts with "error: ", names the remedy and has no traceback."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import run_script

ROOT = Path(__file__).parent.parent
SMALL = """
    --preset demo --data.height 32 --data.width 64 --runtime.precision no
    --vae.pretrained scratch --vae.freeze-encoder False
""".split()


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """Run a phase in this process, where torch is imported already: the exit code and the lines on stderr."""

    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *SMALL, "--outputs", str(tmp_path / "out"), *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            run_script(importlib.import_module(script).main)
        return end.value.code, capfd.readouterr().err.replace("\r", "\n").splitlines()

    return call


def radiographs(folder, count=3):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def manifest(folder, **columns):
    """A manifest over three radiographs with these constant columns."""
    radiographs(folder)
    with open(folder / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", *columns], *([f"{index}.png", *columns.values()] for index in range(3))])
    return folder


def empty_folder(path):
    path.mkdir()
    return path


def a_text_file(path):
    path.write_text("radiographs are in the other folder")
    return path


def only_garbage(path):
    for index in range(3):
        path.mkdir(exist_ok=True)
        (path / f"{index}.png").write_bytes(b"not a picture")
    return path


DATA = {
    "wrong path": (lambda path: path, "does not exist: set data.root"),
    "empty folder": (empty_folder, "holds no radiographs: put .dcm"),
    "a text file": (a_text_file, "neither a folder nor a .csv manifest: set data.root"),
    "no normals": (lambda path: manifest(path, label=1), "no normal radiograph to train on: add some with label 0"),
    "one patient": (lambda path: manifest(path, patient="A"), "say who is who in the column patient of a manifest.csv"),
    "a wrong label": (
        lambda path: manifest(path, label="sick"),
        "row 2, column label: 'sick' is unknown: write 0 for normal",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_trained_on_names_the_remedy(name, call, tmp_path):
    make, remedy = DATA[name]
    code, lines = call("train_vae", "--data.root", make(tmp_path / "data"))
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and remedy in lines[0]


@pytest.mark.filterwarnings("ignore:3 of 3 files")
def test_unreadable_files_are_listed_in_a_file_that_the_error_names(call, tmp_path):
    code, lines = call("train_vae", "--data.root", only_garbage(tmp_path / "data"))
    report = tmp_path / "out" / "phase1_vae" / "skipped_local_only.csv"
    assert code == 2 and lines[-1].startswith("error: 3 of 3 files cannot be read") and str(report) in lines[-1]
    assert report.read_text().count(".png") >= 3


FLAGS = {
    "unknown preset": (["--preset", "tpu"], "unknown preset 'tpu': choose one of default, cpu, gpu, demo"),
    "negative weight": (["--vae.lambda-grad", "-1"], "vae.lambda_grad must be at least 0, got -1"),
    "indivisible size": (
        ["--data.width", "100"],
        "data.width = 100 does not divide by 32 (VAE 8 x UNet 4): use 96 or 128",
    ),
    "no weight at all": (
        ["--inference.alpha-l1", "0", "--inference.beta-grad", "0", "--inference.gamma-hf", "0"],
        "must be above 0",
    ),
}


@pytest.mark.parametrize("script", ["train_vae", "extract_latents", "train_flowdiff", "inference"])
@pytest.mark.parametrize("name", FLAGS)
def test_a_wrong_number_is_refused_by_every_phase_before_it_starts(script, name, call, tmp_path):
    flags, remedy = FLAGS[name]
    code, lines = call(script, *flags)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and remedy in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_frozen_scratch_encoder_names_the_flag(call, tmp_path):
    code, lines = call("train_vae", "--data.root", radiographs(tmp_path / "data"), "--vae.freeze-encoder", "True")
    assert code == 2 and lines[-1].startswith("error: ") and "--vae.freeze-encoder False" in lines[-1]


def test_a_missing_vae_folder_is_named(call, tmp_path):
    code, lines = call(
        "train_vae", "--data.root", radiographs(tmp_path / "data"), "--vae.pretrained", "./models/sd-vae"
    )
    assert code == 2 and lines[-1].startswith(
        "error: vae.pretrained = ./models/sd-vae is no folder: give a diffusers folder"
    )


def test_outputs_that_are_a_file_are_named(call, tmp_path):
    (tmp_path / "out").write_text("")
    code, lines = call("train_vae", "--data.root", radiographs(tmp_path / "data"), "--vae.steps", "1")
    assert code == 2 and lines[-1].startswith("error: ") and str(tmp_path / "out") in lines[-1]


def shell(*command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_from_the_shell_one_line_and_exit_code_two(tmp_path):
    result = shell("train_vae.py", "--data.root", tmp_path / "nowhere", "--outputs", tmp_path / "out")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    remedy = "set data.root to a folder of radiographs or to a manifest.csv"
    assert result.stderr == f"error: {tmp_path / 'nowhere'} does not exist: {remedy}\n"


def test_from_the_shell_a_hub_name_that_cannot_be_had(tmp_path):
    flags = [
        *SMALL,
        "--outputs",
        tmp_path / "out",
        "--data.root",
        radiographs(tmp_path / "data"),
        "--vae.pretrained",
        "nobody/nothing",
    ]
    result = shell(
        "train_vae.py", *flags, "--vae.freeze-encoder", "True", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub")
    )
    last = result.stderr.replace("\r", "\n").splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert (
        last.startswith("error: vae.pretrained = nobody/nothing cannot be loaded: ")
        and "give a local diffusers folder" in last
    )


def test_from_the_shell_phantoms_in_the_way_of_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    result = shell("-m", "phantoms.phantom", "--out", tmp_path / "taken")
    assert result.returncode == 2 and result.stderr == f"error: {tmp_path / 'taken'} is a file: give --out a folder\n"
