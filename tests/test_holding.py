"""One writer at a time, and nothing left of those that were killed."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys

import pytest
from pipeline import ROOT

from checks import UsageError
from holding import hold, is_alive, remove_leftovers, take


def test_a_folder_has_one_holder_for_each_purpose(tmp_path):
    with hold(tmp_path, "results"):
        hold(tmp_path, "reader").close()
        with pytest.raises(UsageError, match="another run is writing"):
            hold(tmp_path, "results")
    hold(tmp_path, "results").close()


def test_a_holder_that_was_killed_holds_no_more(tmp_path):
    code = "import sys, time; from holding import hold; held = hold(sys.argv[1], 'results'); print(1, flush=True)"
    code += "; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as other:
        other.stdout.readline()
        with pytest.raises(UsageError, match="another run is writing"):
            hold(tmp_path, "results")
        other.kill()
    hold(tmp_path, "results").close()


def test_a_process_that_was_forked_off_holds_nothing(tmp_path):
    held, (ours, theirs) = hold(tmp_path, "results"), multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=lambda: (theirs.send("begun"), theirs.recv()))
    child.start()
    assert ours.recv() == "begun"
    with pytest.raises(UsageError, match="another run is writing"):
        hold(tmp_path, "results")
    held.close()  # as when it is killed: the system closes its file
    hold(tmp_path, "results").close()
    ours.send("end")
    child.join()


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("holding.fcntl", None)
    with pytest.warns(UserWarning, match="cannot be locked"):
        hold(tmp_path, "results").close()


def test_an_open_file_is_locked_with_others_or_alone(tmp_path, monkeypatch):
    with open(tmp_path / "a", "w") as one, open(tmp_path / "a") as other:
        first, second = one.fileno(), other.fileno()
        assert take(first, alone=False) and take(second, alone=False) and not take(first, alone=True)
        other.close()
        assert take(first, alone=True)
        monkeypatch.setattr("holding.fcntl", None)
        assert not take(first, alone=True)


def test_the_owner_of_a_folder_is_named_and_forgotten(tmp_path):
    held = hold(tmp_path, "results")
    with pytest.raises(UsageError, match=rf"\(process {os.getpid()} on {socket.gethostname()}, for 0 minutes\)"):
        hold(tmp_path, "results")
    held.close()
    assert (tmp_path / ".results.lock").read_bytes() == b""


@pytest.mark.parametrize("note", ["", "[]", '{"process": 1}', "\0"])
def test_a_note_that_says_nothing_is_no_owner(note, tmp_path):
    held = hold(tmp_path, "results")
    (tmp_path / ".results.lock").write_text(note)
    with pytest.raises(UsageError, match="is writing into [^(]*: wait"):
        hold(tmp_path, "results")
    held.close()


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_without_locks_the_note_of_a_living_owner_counts_and_a_dead_one_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr("holding.fcntl", None)
    note = {"process": os.getppid(), "host": socket.gethostname(), "since": 0.0}
    (tmp_path / ".results.lock").write_text(json.dumps(note))
    with pytest.raises(UsageError, match="another run is writing"):
        hold(tmp_path, "results")
    for other in ({"process": dead_process()}, {"host": "elsewhere"}):
        (tmp_path / ".results.lock").write_text(json.dumps(note | other))
        with pytest.warns(UserWarning, match="cannot be locked"):
            hold(tmp_path, "results").close()


def test_what_a_killed_process_was_writing_is_cleared_away_and_nothing_else(tmp_path):
    dead, folder = dead_process(), tmp_path / "maps"
    folder.mkdir()
    left = [tmp_path / f".checkpoint_last.pt.{dead}.tmp", folder / f".001.npy.{dead}.tmp"]
    others = [
        tmp_path / f".checkpoint_best.pt.{os.getppid()}.tmp",
        tmp_path / f".mine.{os.getpid()}.tmp",
        *(tmp_path / name for name in (".tmp", ".notes.tmp", f"notes.{dead}.tmp", f".notes.{dead}")),
    ]
    for path in [*left, *others]:
        path.write_text("half")
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_who_is_alive():
    assert is_alive(os.getpid()) and is_alive(1) and not is_alive(dead_process())


def test_a_folder_below_with_a_lock_of_its_own_is_left_to_who_holds_it(tmp_path):
    """On another machine a process of that number may be alive, and write."""
    inner = tmp_path / "shard_1_of_2"
    hold(inner, "shard").close()
    (inner / "maps").mkdir()
    file = inner / "maps" / f".000.npy.{dead_process()}.tmp"
    file.write_text("half")
    hold(tmp_path, "results").close()
    assert file.exists()
    hold(inner, "shard").close()
    assert not file.exists()
