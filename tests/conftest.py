"""The fixtures that several files of tests share: the pipeline, run once per session, and a phase run in this one."""

import subprocess

import pytest
import torch
from filelock import FileLock
from pipeline import ROOT, TRAINING, flags_of, namespace, run_here, run_or_tell, sources

import decoded
from config import DataConfig
from phantoms import phantom


def once(base, worker_id, name, make):
    """Call make(folder) once per session, also where pytest-xdist runs several processes: where it is, what it said."""
    folder = (base if worker_id == "master" else base.parent) / "pipeline"
    printed = folder / f"{name}.txt"
    with FileLock(f"{folder}.lock"):
        if not printed.exists():
            folder.mkdir(exist_ok=True)
            printed.write_text("failed")
            printed.write_text(make(folder))
    if printed.read_text() == "failed":
        pytest.fail(f"the pipeline failed where it was built first ({name})")
    return namespace(folder, printed.read_text())


@pytest.fixture(autouse=True)
def own_outputs_untouched(monkeypatch):
    """What is read under default settings is not kept: ./outputs/cache belongs to whoever runs the tests."""
    opened, theirs = decoded.cache_of, DataConfig().cache_folder
    monkeypatch.setattr("dataset.cache_of", lambda config: None if config.cache_folder == theirs else opened(config))


@pytest.fixture(scope="session")
def made(tmp_path_factory, worker_id):
    """Phantoms, and what the three training phases made of them."""

    def make(folder):
        size = {"height": 64, "width": 128, "workers": 1}
        phantom.write_dataset(folder / "phantoms", train=12, val=4, test_normal=3, test_per_lesion=1, **size)
        return "".join(run_or_tell(script, folder) for script in TRAINING)

    return once(tmp_path_factory.getbasetemp(), worker_id, "training", make)


@pytest.fixture(scope="session")
def examined(made, tmp_path_factory, worker_id):
    """The same, and what phase 4 made of it."""
    return once(tmp_path_factory.getbasetemp(), worker_id, "inference", lambda folder: run_or_tell("inference", folder))


@pytest.fixture
def call(made, monkeypatch, capsys, tmp_path):
    """Run a phase here, reading from `made` and writing to a folder of this test."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("train_flowdiff.SAMPLING_STEPS", 2)  # nobody looks at the samples
    torch.set_num_threads(1)

    def call(script, *flags, outputs=tmp_path, data=made.phantoms):
        words = flags_of(outputs, data, *sources(script, made), *flags)
        return run_here(script, words, monkeypatch, capsys)

    return call


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 KiB; skips where one may not be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    decoded._opened.cache_clear()  # a cache there keeps a file open
    subprocess.run(["umount", str(disk)], check=True)
