"""The benchmark that kills training: what it calls whole, and what it calls the same."""

import shutil
import sys

import pytest
import torch
from pipeline import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import faults

from files import load_checkpoint, save_checkpoint


@pytest.mark.parametrize("script", faults.PHASES)
def test_a_copy_of_a_run_is_whole_and_the_same(script, made, tmp_path):
    theirs = made.out / faults.PHASES[script]
    ours = shutil.copytree(theirs, tmp_path / "ours")
    assert faults.is_whole(ours, script) and faults.same(ours, theirs, script)
    content = load_checkpoint(
        ours / "checkpoint_last.pt", faults.KINDS["checkpoint_last.pt"][script != "train_vae"], ""
    )
    name = next(iter(content["weights"]))
    content["weights"][name] = content["weights"][name].nextafter(torch.tensor(9.0))
    save_checkpoint(ours / "checkpoint_last.pt", content["kind"], content)
    assert faults.is_whole(ours, script) and not faults.same(ours, theirs, script)


@pytest.mark.parametrize("name", ["checkpoint_best.pt", "curves.png", "config.json"])
def test_half_a_file_under_its_own_name_is_seen(name, made, tmp_path):
    ours = shutil.copytree(made.phase3, tmp_path / "ours")
    (ours / name).write_bytes((ours / name).read_bytes()[:-200])
    assert not faults.is_whole(ours, "train_flowdiff")


def test_a_validation_that_differs_is_seen(made, tmp_path):
    ours = shutil.copytree(made.phase1, tmp_path / "ours")
    log = (ours / "log.csv").read_text().replace("val/loss,0.", "val/loss,1.")
    (ours / "log.csv").write_text(log)
    assert not faults.same(ours, made.phase1, "train_vae")


def test_trials_are_counted(capsys):
    good = {"in_a_write": True, "whole": True, "went_on": True, "resumed": True, "leftovers": 0, "identical": True}
    bad = dict.fromkeys(good, False) | {"leftovers": 2}
    assert faults.summary([good, good, bad]) == {
        "killed": 3,
        "in a write": 2,
        "resumed": "2/3",
        "went on": 2,
        "identical": "2/3",
        "whole": "2/3",
        "leftovers": 2,
    }
