"""Progress on a terminal and in a log, and silence."""

import io
import subprocess
import sys

import pytest
from pipeline import ENVIRONMENT, ROOT

import progress


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def shown(monkeypatch, terminal, seconds, steps=10):
    """What a bar writes of so many steps, each of which takes so long by the clock."""
    stream, now = Stream(terminal), [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress.tqdm, "monitor_interval", 0)
    moving = progress.bar(total=steps, desc="phase 1", unit="step")
    moving._time = lambda: now[0]
    moving.start_t = moving.last_print_t = 0.0
    for _ in range(steps):
        now[0] += seconds
        moving.update()
    moving.close()
    return stream.getvalue()


def test_a_log_gets_whole_lines_now_and_then_and_none_of_what_is_done_soon(monkeypatch):
    assert shown(monkeypatch, False, seconds=1.0) == ""
    lines = shown(monkeypatch, False, seconds=45.0).splitlines()
    assert 3 <= len(lines) <= 6 and "\r" not in "".join(lines)
    assert lines[0].startswith("phase 1: 2 of 10, 01:30 gone, 06:00 left") and "s/step" in lines[0]


def test_a_terminal_gets_a_bar_that_moves(monkeypatch):
    text = shown(monkeypatch, True, seconds=1.0)
    assert text.count("\r") >= 10 and "100%" in text


@pytest.mark.parametrize("flags", [[], ["--quiet"]])
def test_quiet_leaves_errors_alone(flags, tmp_path):
    command = [sys.executable, "extract_latents.py", *flags, "--outputs", str(tmp_path), "--help-me"]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: unknown flag --help-me") and not result.stdout


def test_what_must_not_be_missed_is_heard_in_silence_too(capsys):
    with progress.own_voice():
        progress.warn("loud")
        progress.be_quiet()
        print("chatter")
        progress.warn("three files are too coarse")
    print("again")
    shown = capsys.readouterr()
    assert shown.out == "loud\nagain\n" and shown.err == "three files are too coarse\n"


def test_a_quiet_phase_does_its_work_and_says_nothing_and_the_next_one_speaks(call, tmp_path):
    quiet = call("extract_latents", "--quiet", outputs=tmp_path / "quiet")
    assert (quiet.code, quiet.out) == (0, "") and (tmp_path / "quiet/phase2_latents/latents.json").is_file()
    assert "next: python train_flowdiff.py" in call("extract_latents", outputs=tmp_path / "loud").out
