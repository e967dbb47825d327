"""What happens around a run: folders that vanish, disks that answer late, clocks that are set back."""

import itertools
import shutil
import sys
import time

import pytest
from pipeline import ROOT

import dataset
import files

sys.path.insert(0, str(ROOT / "benchmarks"))
import faults

PHASES = {"train_vae": "phase1_vae", "train_flowdiff": "phase3_flowdiff"}


@pytest.fixture
def set_back(monkeypatch):
    """Each look at the clock shows an hour less than the one before."""
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(hours))


@pytest.fixture
def late(monkeypatch):
    """Files that are read and written after a while, now and then."""
    read, flush, turns = dataset.read_radiograph, files.os.fsync, itertools.count()

    def waiting(method):
        def waits(*given):
            time.sleep(0.2 * (next(turns) % 7 == 0))
            return method(*given)

        return waits

    monkeypatch.setattr(dataset, "read_radiograph", waiting(read))
    monkeypatch.setattr(files.os, "fsync", waiting(flush))


@pytest.mark.parametrize("script", PHASES)
@pytest.mark.parametrize("what", ["set_back", "late"])
def test_nothing_depends_on_the_clock_or_on_how_soon_a_disk_answers(script, what, call, tmp_path, request):
    assert call(script, outputs=tmp_path / "calm").code == 0
    request.getfixturevalue(what)
    assert call(script).code == 0
    assert faults.same(tmp_path / PHASES[script], tmp_path / "calm" / PHASES[script], script)


@pytest.mark.parametrize("workers", [0, 1])
def test_radiographs_that_vanish_while_they_are_read_are_one_line(workers, call, made, tmp_path, monkeypatch):
    """Nothing is kept in memory, and the folder goes after everything was read once."""
    data = shutil.copytree(made.phantoms, tmp_path / "data")
    make = dataset.RadiographDataset.augmented

    def vanishing(self, *given):
        shutil.rmtree(data, ignore_errors=True)
        return make(self, *given)

    monkeypatch.setattr(dataset.RadiographDataset, "augmented", vanishing)
    result = call("train_vae", "--data.cache-gb", 0, "--data.num-workers", workers, data=data)
    assert result.code == 2 and str(data) not in result.error
    assert "No such file or directory, though it could be read at first: give the same" in result.error, result.error


@pytest.mark.parametrize("script", PHASES)
def test_a_folder_of_results_that_vanishes_costs_what_was_in_it_and_no_more(script, call, tmp_path, monkeypatch):
    out, write, turns = tmp_path / PHASES[script], files.os.replace, itertools.count()

    def vanishing(source, target):
        write(source, target)
        if next(turns) == 3:
            shutil.rmtree(out)

    monkeypatch.setattr(files.os, "replace", vanishing)
    result = call(script)
    assert result.code in (0, 2) and next(turns) > 3, result.error
    assert result.code == 0 or "No such file" in result.error
    assert call(script, outputs=tmp_path).code == 0
    assert faults.is_whole(out, script) and (out / "checkpoint_best.pt").is_file()
