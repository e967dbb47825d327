"""What signals do to a run: real ones to real processes, and the rules in this one."""

import ast
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from pipeline import ENVIRONMENT, ROOT, TRAINING, flags_of, sources
from test_interruptions import LONGER, PLACES, TOTAL, last, same_end

import interruption
from interruption import Interrupted, Steps
from runtime import run_script

NAMES = {number: signal.Signals(number).name for number in interruption.SIGNALS}


@pytest.fixture(autouse=True)
def as_it_was():
    """No test leaves words or a stretch of steps to the next one."""
    before = dict(interruption._memory)
    yield
    interruption._memory.update(before)
    Steps.under_way = None


# ---------------------------------------------------------------- real signals to real phases


def as_from_a_shell():
    """No signal is ignored, whatever ignores them where the tests run (nohup, a job in the background)."""
    for number in interruption.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def start(words, **how):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | how
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, preexec_fn=as_from_a_shell, **pipes)


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert path.exists(), process.communicate()[1]


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "2>&-"])
def test_a_run_whose_caller_closed_its_streams_does_its_work(closed, tmp_path):
    lines = "import interruption; interruption.begin(); from progress import bar; list(bar([1]))"
    lines += f"; file = open({str(tmp_path / 'number')!r}, 'w'); file.write(str(file.fileno()))"
    run = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", lines], cwd=ROOT)
    assert run.returncode == 0 and int((tmp_path / "number").read_text()) > 2


@pytest.mark.parametrize(
    ("script", "number"),
    [
        ("train_vae", signal.SIGTERM),
        ("train_flowdiff", signal.SIGINT),
        ("train_flowdiff", signal.SIGHUP),
    ],
)
def test_a_signal_lets_the_step_end_and_the_run_goes_on_from_there(script, number, call, made, tmp_path):
    broken, whole, longer = tmp_path / "broken", tmp_path / "whole", LONGER[script]
    process = start([f"{script}.py", *flags_of(broken, made.phantoms, *sources(script, made), *longer)])
    wait_for(broken / PLACES[script] / "checkpoint_last.pt", process)
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    step = last(broken, script)["step"]
    assert process.returncode == 128 + number, error
    words = f"interrupted by {NAMES[number]}: the same command continues from step {step} of {TOTAL[script]}"
    assert error.strip().splitlines()[-1] == words and "Traceback" not in error
    assert not list(broken.rglob("*.tmp"))
    assert call(script, *longer, outputs=broken).code == call(script, *longer, outputs=whole).code == 0
    same_end(script, broken, whole)


def test_a_terminal_that_is_lost_takes_no_step_with_it(made, tmp_path):
    """SIGHUP, and nobody to print to any more."""
    terminal, theirs = os.openpty()
    longer = ["--vae.steps", 9000, "--vae.validate-every", 9000, "--runtime.checkpoint-every", 9000]
    words = ["train_vae.py", *flags_of(tmp_path, made.phantoms, *longer)]
    process = start(words, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    said = b""
    while b"step 0: validation loss" not in said:
        said += os.read(terminal, 4096)
    time.sleep(0.5)  # into the steps
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 129
    assert 0 < last(tmp_path, "train_vae")["step"] < 9000


def test_ctrl_c_reaches_the_processes_that_read_ahead_and_they_go_on_reading(made, tmp_path):
    """A terminal sends it to all of them at once."""
    longer = ["--vae.steps", 400, "--vae.validate-every", 400, "--runtime.checkpoint-every", 2, "--data.num-workers", 2]
    process = start(["train_vae.py", *flags_of(tmp_path, made.phantoms, *longer)], start_new_session=True)
    wait_for(tmp_path / "phase1_vae/checkpoint_last.pt", process)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    step = last(tmp_path, "train_vae")["step"]
    assert process.returncode == 130 and "Traceback" not in error, error
    assert error.strip().endswith(f"the same command continues from step {step} of 400") and step < 400


def test_a_process_that_reads_ahead_and_is_killed_ends_the_run_with_the_remedy(made, tmp_path):
    longer = ["--vae.steps", 400, "--vae.validate-every", 400, "--runtime.checkpoint-every", 2, "--data.num-workers", 1]
    process = start(["train_vae.py", *flags_of(tmp_path, made.phantoms, *longer)])
    wait_for(tmp_path / "phase1_vae/checkpoint_last.pt", process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for child in map(int, children):
        os.kill(child, signal.SIGKILL)
    error = process.communicate(timeout=120)[1].strip().splitlines()[-1]
    assert process.returncode == 2
    assert error.startswith("error: a process that reads radiographs ahead was killed") and "data.num_workers" in error
    assert "the same command continues from step" in error


WRONG_AHEAD = """
import interruption; interruption.begin()
from checks import UsageError
from presets import preset
from runtime import made_ahead, run_script

class Wrong:
    def __getitem__(self, item):
        raise UsageError("no such fill")

run_script(lambda: list(made_ahead(Wrong(), range(3), preset("cpu"))))
"""


def test_an_error_of_a_process_that_works_ahead_ends_the_run_and_that_process():
    """Its loader lives on in the frames of the error, and its process ignores the signal that would end it."""
    process = start(["-c", WRONG_AHEAD], start_new_session=True)
    try:
        error = process.communicate(timeout=60)[1]
    finally:
        left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
        for one in map(int, left):
            os.kill(one, signal.SIGKILL)
    assert process.returncode == 2 and error == "error: no such fill\n" and not left


@pytest.mark.parametrize("number", interruption.SIGNALS, ids=NAMES.get)
def test_during_the_imports_there_is_nothing_to_continue_from(number):
    process = start(["-c", "import interruption, time; interruption.begin(); print(1, flush=True); time.sleep(60)"])
    process.stdout.readline()
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert error == f"interrupted by {NAMES[number]}: {interruption.NOTHING_YET}\n"


def test_what_the_caller_ignores_stays_ignored():
    """As under nohup."""
    code = (
        "import interruption, os, signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "interruption.begin()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "print('still here')"
    )
    assert start(["-c", code]).communicate(timeout=60)[0] == "still here\n"


@pytest.mark.parametrize("script", [*TRAINING, "inference"])
def test_every_script_begins_before_its_long_imports(script):
    body = ast.parse((ROOT / f"{script}.py").read_text()).body
    assert ast.unparse(body[1]).split("\n    ") == [
        "if __name__ == '__main__':",
        "import interruption",
        "interruption.begin()",
    ]


@pytest.mark.parametrize("script", ["detection", "ablation", "repair"])
def test_benchmarks_of_hours_begin_before_their_long_imports(script):
    begun = ast.parse((ROOT / "benchmarks" / f"{script}.py").read_text()).body[1]
    assert ast.unparse(begun).startswith("if __name__ == '__main__':") and "interruption.begin()" in ast.unparse(begun)


# ---------------------------------------------------------------- the rules


def test_a_signal_waits_for_the_step_and_the_second_does_not(capfd):
    interruption.running()
    steps, taken = Steps(), []
    with pytest.raises(Interrupted) as end:
        for item in steps.of(range(5)):
            taken.append((item, steps.asked))
            if item == 1:
                interruption._on_signal(signal.SIGTERM, None)
                assert steps.asked
    assert taken == [(0, False), (1, False)] and end.value.code == 143
    assert "SIGTERM: finishing the step" in capfd.readouterr().err
    with pytest.raises(Interrupted):
        for _ in steps.of(range(5)):
            interruption._on_signal(signal.SIGTERM, None)
            interruption._on_signal(signal.SIGINT, None)
            pytest.fail("the second signal waited")


def test_a_signal_that_comes_while_the_end_is_found_out_is_not_lost():
    interruption.running()
    steps = Steps()

    def items():
        yield 1
        interruption._on_signal(signal.SIGTERM, None)

    with pytest.raises(Interrupted, match="SIGTERM"):
        list(steps.of(items()))


def test_outside_of_steps_a_signal_ends_the_run_at_once():
    interruption.running()
    list(Steps().of(range(3)))
    with pytest.raises(Interrupted, match="SIGHUP"):
        interruption._on_signal(signal.SIGHUP, None)


def test_the_last_words_are_those_that_were_remembered_last(capsys):
    def main():
        interruption.remember(interruption.continues(4, 9))
        raise Interrupted(signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 143
    assert capsys.readouterr().err == "interrupted by SIGTERM: the same command continues from step 4 of 9\n"


def test_all_processes_stop_after_the_same_step_and_the_first_one_speaks(monkeypatch, capsys):
    from types import SimpleNamespace

    from runtime import all_stop

    heard = torch.tensor([0, signal.SIGTERM, 0, 0])
    several = SimpleNamespace(num_processes=4, device="cpu", gather=lambda own: heard)
    steps = Steps()
    assert all_stop(steps, several) and steps.number == signal.SIGTERM
    heard.zero_()
    assert not all_stop(Steps(), several)
    monkeypatch.setenv("RANK", "3")

    def main():
        raise Interrupted(signal.SIGTERM)

    with pytest.raises(SystemExit):
        run_script(main)
    assert capsys.readouterr().err == ""
