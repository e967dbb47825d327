"""What phase 4 writes beside its loop: the same bytes, all of it or an error, and nobody left over."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from pipeline import ROOT
from test_inference import results_in

import inference
import interruption
from checks import UsageError, require
from files import write_json
from interruption import SIGNALS
from results import Unfinished
from writing import Writing

BOTH = pytest.mark.parametrize("kind", ["draw", "keep"])


@pytest.fixture
def writing():
    """One process that draws, three things at once."""
    with Writing(1, 3) as writing:
        yield writing


def test_processes_that_draw_leave_the_bytes_of_one_that_does_it_all(call, examined, tmp_path):
    known = ["--inference.calibration", examined.out / "calibration", "--inference.figures", -1]
    folders = [tmp_path / f"{workers}" for workers in (0, 2)]
    for folder in folders:
        result = call("inference", *known, "--data.num-workers", folder.name, outputs=folder)
        assert result.code == 0 and "9 images examined" in result.out
    one, several = (results_in(folder / "phase4_inference") for folder in folders)
    assert one == several and len([path for path in one if path.match("result_*.png")]) == 9


def test_what_a_note_lists_is_on_the_disk(call, examined, monkeypatch):
    save, figures = Unfinished.save, []

    def checked(self, done):
        figures.append([self.folder / entry["figure"] for entry in self.entries])
        maps = [self.folder / f"maps/{entry['index']:03d}.npy" for entry in self.entries]
        assert len(maps) == done and all(path.is_file() for path in (*figures[-1], *maps))
        save(self, done)

    monkeypatch.setattr(Unfinished, "save", checked)
    monkeypatch.setattr(inference, "SAVE_EVERY", 1)
    flags = ["--inference.figures", -1, "--inference.batch-size", 2, "--data.num-workers", 2]
    assert call("inference", "--inference.calibration", examined.out / "calibration", *flags).code == 0
    assert [len(paths) for paths in figures[:5]] == [2, 4, 6, 8, 9]


@BOTH
def test_after_finish_everything_is_there(kind, writing, tmp_path):
    paths = [tmp_path / f"{number}.json" for number in range(8)]
    for path in paths:
        getattr(writing, kind)(write_json, path, {})
    writing.finish()
    assert all(path.is_file() for path in paths)


def test_leaving_finishes(tmp_path):
    with Writing(1, 1) as writing:
        writing.draw(write_json, tmp_path / "drawn", {})
        writing.keep(write_json, tmp_path / "kept", {})
    assert {path.name for path in tmp_path.iterdir()} == {"drawn", "kept"}


def test_who_asks_for_more_than_may_wait_waits_for_the_oldest(writing):
    disk_answers = threading.Event()
    for _ in range(3):
        writing.keep(disk_answers.wait)
    threading.Timer(0.2, disk_answers.set).start()
    assert not disk_answers.is_set()
    writing.keep(print)
    assert disk_answers.is_set()


def test_no_process_is_started_before_a_picture_nor_for_less_than_one_worker(monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **how: pytest.fail("started"))
    for workers in (0, 2):
        with Writing(workers, 4) as writing:
            writing.keep(write_json, tmp_path / f"{workers}.json", {})
    with Writing(0, 4) as writing:
        writing.draw(write_json, tmp_path / "here.json", {})
        assert (tmp_path / "here.json").is_file()  # at once


# ---------------------------------------------------------------- what goes wrong


@BOTH
@pytest.mark.parametrize(
    ("function", "given", "error", "words"),
    [
        (require, (False, "lower it"), UsageError, "^lower it$"),
        (open, ("/no/such/folder",), FileNotFoundError, "No such file or directory: '/no/such/folder'"),
        (np.zeros, ((2**50,),), MemoryError, "Unable to allocate"),
    ],
)
def test_an_error_ends_the_run_with_its_own_words(kind, function, given, error, words, writing):
    with pytest.raises(error, match=words):
        getattr(writing, kind)(function, *given)
        writing.finish()


def test_an_error_of_ours_says_where_it_happened(writing):
    with pytest.raises(RuntimeError, match="^ValueError: embedded null byte$") as told:
        writing.draw(os.stat, "\0")
        writing.finish()
    assert "in _attempt" in str(told.value.__cause__)


@BOTH
def test_a_full_disk_is_told_as_ever(kind, writing, small_disk):
    with pytest.raises(UsageError, match=r"x.json cannot be written, the disk is full .*: make room"):
        getattr(writing, kind)(write_json, small_disk / "x.json", {"rows": ["x" * 100] * 5000})
        writing.finish()
    assert not list(small_disk.iterdir())


def test_an_error_is_heard_when_the_next_one_is_asked_for(writing):
    writing.keep(require, False, "lower it")
    with pytest.raises(UsageError, match="lower it"):
        while True:
            writing.keep(time.sleep, 0.01)


def test_after_an_error_what_has_not_begun_is_left_out(tmp_path):
    with pytest.raises(UsageError, match="of the loop"), Writing(1, 9) as writing:
        writing.keep(time.sleep, 0.2)
        writing.keep(write_json, tmp_path / "late", {})
        raise UsageError("of the loop")
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_killed_ends_the_run_with_the_remedy(writing):
    interruption.remember("the same command goes on after 3 of 9 images")
    with pytest.raises(
        UsageError, match=r"draws was killed, .*lower data.num_workers .*; the same .* after 3 of 9 images"
    ):
        writing.draw(signal.raise_signal, signal.SIGKILL)
        writing.finish()


def test_a_process_that_ended_by_itself_is_not_blamed_on_memory(writing):
    with pytest.raises(UsageError, match=r"ended with code 3, see above: --data.num-workers 0"):
        writing.draw(os._exit, 3)
        writing.finish()


# ---------------------------------------------------------------- signals, and the end of the run


def test_signals_are_for_the_run_and_not_for_who_draws_even_before_its_first_line(writing, monkeypatch, tmp_path):
    begin = subprocess.Popen

    def begin_and_tell(*given, **how):
        process = begin(*given, **how)
        assert [process.send_signal(number) for number in SIGNALS]
        return process

    monkeypatch.setattr(subprocess, "Popen", begin_and_tell)
    writing.draw(write_json, tmp_path / "drawn", {})
    writing.finish()
    assert (tmp_path / "drawn").is_file()


def test_who_draws_ends_with_a_run_that_was_killed():
    """It has the same stdout: that is at its end when both are gone."""
    lines = "with Writing(1, 1) as writing:\n writing.draw(print, 'drawn', 0)\n writing.finish()\n time.sleep(60)"
    code = f"import time\nfrom writing import Writing\n{lines}"
    unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, env=unbuffered)
    assert run.stdout.readline() == b"drawn 0\n"
    run.kill()
    began = time.monotonic()
    assert run.stdout.read() == b"" and time.monotonic() - began < 30
