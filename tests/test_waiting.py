"""How long the device waited for data: told by a clock that the tests turn, whatever the machine's load."""

import itertools
import re
import types

import pytest
import torch
from test_manifest import write_images
from torch.utils.data import DataLoader

import waiting as waiting_module
from computing import busy
from config import DataConfig
from dataset import open_datasets
from interruption import Interrupted, Steps
from radiographs.manifest import list_records
from waiting import Waiting


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) lets them pass; nothing else does."""
    now = [0.0]

    def passes(seconds):
        now[0] += seconds

    monkeypatch.setattr(waiting_module.time, "perf_counter", lambda: now[0])
    return passes


def reader(clock, seconds, count=4, end=0.0):
    """A reader that takes so long for each batch, and for finding that there is no other one."""
    for number in range(count):
        clock(seconds)
        yield number
    clock(end)


@pytest.mark.parametrize(("reading", "computing", "share"), [(3, 1, 0.75), (0, 1, 0.0), (1, 0, 1.0), (0.5, 1.5, 0.25)])
def test_the_share_is_that_of_the_time_in_which_no_batch_came(reading, computing, share, clock):
    waiting, batches = Waiting(), []
    for batch in waiting.of(reader(clock, reading)):
        batches.append(batch)
        clock(computing)
    assert batches == [0, 1, 2, 3] and waiting.share == pytest.approx(share)
    assert waiting.seconds == 4 * reading and waiting.whole == 4 * (reading + computing)


def test_the_start_of_a_loader_and_its_end_are_waited_for_too(clock):
    class Loader:
        def __iter__(self):
            clock(5)
            return reader(clock, 0, end=2)

    waiting = Waiting()
    assert len(list(waiting.of(Loader()))) == 4 and waiting.seconds == 7


def test_a_validation_within_a_training_counts_its_time_once(clock):
    waiting = Waiting()
    for _ in waiting.of(reader(clock, 1, count=2)):
        for _ in waiting.of(reader(clock, 2, count=3)):
            clock(1)
        clock(10)
    assert waiting.seconds == 2 + 2 * 6 and waiting.whole == 2 * (1 + 9 + 10)


def test_time_between_two_loops_is_nobodys(clock):
    waiting = Waiting()
    for _ in range(2):
        list(waiting.of(reader(clock, 1)))
        clock(100)
    assert waiting.whole == 8 and waiting.told() == "the device waited for data 100.0 % of the time (8.0 of 8.0 s)"


def test_a_run_that_found_everything_done_did_not_wait(clock):
    waiting = Waiting()
    assert list(waiting.of(reader(clock, 1, count=0))) == []
    assert "waited" not in waiting.told() and "no batch was left" in waiting.told()


def test_the_share_can_be_asked_for_on_the_way(clock):
    waiting, shares = Waiting(), []
    for _ in waiting.of(reader(clock, 1, count=2)):
        clock(1)
        shares.append(waiting.share)
    assert shares == [0.5, 0.5] and Waiting().share == 0


def test_a_loop_that_is_left_early_or_broken_by_a_signal_or_an_error_ends_there(clock):
    waiting, steps = Waiting(), Steps()
    for _ in waiting.of(reader(clock, 1)):
        break
    with pytest.raises(Interrupted):
        for _ in steps.of(waiting.of(reader(clock, 1))):
            steps.number = 15
    with pytest.raises(ZeroDivisionError):
        list(waiting.of(1 / number for number in (1, 0)))
    clock(100)
    assert waiting.whole == waiting.seconds == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_loader_pass_through_as_they_are(workers, tmp_path):
    config = DataConfig(height=32, width=32, cache_disk_gb=0)
    records = list_records(write_images(tmp_path, 6))
    data = open_datasets({"train": records}, config, 0, tmp_path / "skipped.csv", quiet=True)["train"]
    plain, waiting = DataLoader(data, 4, num_workers=workers), Waiting()
    for batch, expected in itertools.zip_longest(waiting.of(plain), plain):
        assert torch.equal(batch["image"], expected["image"])
    assert 0 < waiting.seconds <= waiting.whole


@pytest.mark.parametrize("script", ["train_vae", "extract_latents", "train_flowdiff", "inference"])
def test_every_phase_ends_by_saying_it(script, call, tmp_path):
    out = call(script, "--inference.figures", 1, "--inference.method", "plain").out
    (told,) = re.findall(r"^the device waited for data (\d+\.\d) % of the time \((.+) of (.+) s\)$", out, re.MULTILINE)
    assert 0 <= float(told[0]) <= 100 and float(told[1]) <= float(told[2])
    logs = list(tmp_path.glob("*/log.csv"))
    assert len(logs) == script.startswith("train_")
    assert all(",train/waited_for_data," in log.read_text() for log in logs)


@pytest.mark.parametrize("script", ["train_vae", "train_flowdiff"])
def test_batches_of_a_validation_are_waited_for_too(script, call, monkeypatch):
    of, loops = Waiting.of, []
    monkeypatch.setattr(Waiting, "of", lambda waiting, batches: loops.append(batches) or of(waiting, batches))
    assert call(script).code == 0
    assert len([batches for batches in loops if not isinstance(batches, DataLoader)]) == 1  # the training's, on a bar
    assert any(isinstance(batches, DataLoader) for batches in loops)


def test_a_device_that_is_busy_when_the_batch_comes_has_not_waited(clock):
    at_work = iter([False, True, True, False, True])
    waiting = Waiting(busy=lambda: next(at_work))
    assert len(list(waiting.of(reader(clock, 3)))) == 4
    assert waiting.seconds == 6 and waiting.whole == 12  # the first batch, and the one that it ran out of work for


def test_a_gpu_is_busy_while_its_stream_has_something_left(monkeypatch):
    left = types.SimpleNamespace(query=lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: left)
    assert busy(torch.device("cuda"))() and not busy(torch.device("cpu"))()
