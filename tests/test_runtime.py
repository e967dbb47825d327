"""What every phase leans on: reproducible order and noise, steps that may fail, the log."""

import csv
import errno
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import runtime
from checks import UsageError
from config import Config, RuntimeConfig
from guard import StepGuard
from run_log import Meter, RunLog, read_log
from runtime import EMA, StepBatches, generator, learning_rate, own_part, run_script

# ---------------------------------------------------------------- order and noise


@pytest.mark.parametrize("stopped_at", [1, 4, 9, 10])
def test_a_resumed_order_is_the_uninterrupted_one(stopped_at):
    whole = list(StepBatches(7, 3, 0, 10, seed=5))
    assert list(StepBatches(7, 3, 0, stopped_at, seed=5)) + list(StepBatches(7, 3, stopped_at, 10, seed=5)) == whole


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (7, 3), (3, 8)])
def test_every_epoch_visits_every_row_once(size, batch_size):
    keys = [key for batch in StepBatches(size, batch_size, 0, 2 * size, seed=0) for key in batch]  # 2 batch_size epochs
    assert Counter(keys) == Counter((epoch, row) for epoch in range(2 * batch_size) for row in range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second, other = (
        list(StepBatches(50, 50, start, start + 1, seed=s))[0] for start, s in ((0, 0), (1, 0), (0, 1))
    )
    assert len({tuple(row for _, row in batch) for batch in (first, second, other)}) == 3


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_one_global_order(ranks):
    alone = list(StepBatches(11, 2 * ranks, 0, 6, seed=0))
    shares = [list(StepBatches(11, 2, 0, 6, seed=0, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert [sum((share[step] for share in shares), []) for step in range(6)] == alone


def test_the_number_of_batches_is_the_number_of_steps_left():
    assert [len(StepBatches(7, 3, start, 10, seed=0)) for start in (0, 4, 10, 12)] == [10, 6, 0, 0]
    assert list(StepBatches(7, 3, 12, 10, seed=0)) == []


def test_the_learning_rate_rises_linearly_and_ends_at_a_tenth():
    rates = [learning_rate(step, 2.0, 4, 100) for step in range(101)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[4] == 2.0  # continuous where warm-up ends
    assert rates[52] == pytest.approx(1.1) and rates[100] == pytest.approx(0.2)
    assert all(earlier >= later for earlier, later in zip(rates[4:], rates[5:], strict=False))


def test_the_learning_rate_needs_no_warm_up_and_stays_down_after_the_end():
    assert learning_rate(0, 1.0, 0, 10) == 1.0 and learning_rate(50, 1.0, 0, 10) == pytest.approx(0.1)
    assert learning_rate(5, 1.0, 10, 10) == pytest.approx(0.6)  # a run shorter than its warm-up


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_ema_follows_its_recursion(decay):
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    ema, expected = EMA(model, decay), None
    for n in range(30):
        torch.nn.init.normal_(model.weight)
        ema.update(model)
        current = min(decay, (1 + n) / (10 + n))
        expected = (
            model.weight.detach().clone() if n == 0 else current * expected + (1 - current) * model.weight.detach()
        )
    torch.testing.assert_close(ema.module.weight, expected)


def test_ema_holds_no_gradient_and_does_not_touch_the_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout())
    before = model[0].weight.detach().clone()
    ema = EMA(model, 0.9)
    ema.update(model)
    assert not any(weight.requires_grad for weight in ema.module.parameters()) and not ema.module.training
    assert model[0].weight.requires_grad and model.training and torch.equal(model[0].weight, before)


def test_an_ema_taken_up_again_goes_on_where_it_was():
    model = torch.nn.Linear(3, 2)
    one = EMA(model, 0.9)
    for _ in range(3):
        torch.nn.init.normal_(model.weight)
        one.update(model)
    other = EMA(torch.nn.Linear(3, 2), 0.9)
    other.load_state_dict(one.state_dict())
    torch.nn.init.normal_(model.weight)
    for ema in (one, other):
        ema.update(model)
    assert torch.equal(one.module.weight, other.module.weight)


def test_the_parts_of_all_processes_are_the_whole():
    whole = torch.arange(12).reshape(6, 2)
    ranks = [SimpleNamespace(num_processes=3, process_index=rank) for rank in range(3)]
    assert torch.equal(torch.cat([own_part(whole, rank) for rank in ranks]), whole)


def test_noise_depends_on_every_part_of_its_key_and_on_nothing_else():
    keys = [
        (0, "noise", 1, 0),
        (1, "noise", 1, 0),
        (0, "order", 1, 0),
        (0, "noise", 2, 0),
        (0, "noise", 1, 1),
        (0, "noise", 11, 0),
        (0, "noise", 1),
    ]
    draws = [tuple(torch.randn(4, generator=generator(*key)).tolist()) for key in keys]
    torch.manual_seed(99)
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(torch.randn(4, generator=generator(*key)).tolist()) for key in keys]


# ---------------------------------------------------------------- scripts


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("do this"), 2, "error: do this\n"),
        (KeyboardInterrupt(), 130, "interrupted: nothing to continue from"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 2, "error: the GPU has too little memory: lower the"),
        (MemoryError(), 2, "error: the machine has too little memory: lower this"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "error: the machine has too"),
        (
            RuntimeError("can't start new thread"),
            2,
            "error: the machine has too little memory (can't start new thread)",
        ),
        (RuntimeError("could not create a primitive"), 2, "error: the machine has too little memory (could not create"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: the disk is full or over its quota: make room"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "error: nobody reads what is printed any more: print into a"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_a_code(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main)
    shown = capsys.readouterr().err
    assert end.value.code == code and shown.startswith(line) and shown.count("\n") == 1


@pytest.mark.parametrize("keeps", [True, False])
def test_who_keeps_freed_memory_is_told_how_to_hand_it_back(keeps, monkeypatch, capsys):
    def main():
        raise MemoryError

    monkeypatch.setattr(runtime, "keep_memory", lambda: keeps)
    with pytest.raises(SystemExit):
        run_script(main)
    assert (f"begin the command with {runtime.HAND_BACK}" in capsys.readouterr().err) == keeps


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def test_what_onednn_cannot_do_is_not_called_a_lack_of_memory():
    def main():
        raise RuntimeError("could not create a primitive descriptor for a convolution")

    with pytest.raises(RuntimeError, match="descriptor"):
        run_script(main)


def test_cuda_without_a_gpu_names_the_way_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--runtime.device cpu"):
        runtime.start(RuntimeConfig(device="cuda"))


# ---------------------------------------------------------------- log


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.reader(file))


def test_a_resumed_log_drops_what_came_after_and_says_where_it_was_cut(tmp_path):
    log = RunLog(tmp_path, "phase", Config())
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": step / 8, "kl": "n/a"})
    again = RunLog(tmp_path, "phase", Config(), from_step=2)
    again.write(3, {"loss": 9.0})
    assert rows(tmp_path) == [
        ["step", "name", "value"],
        *[[str(s), n, v] for s, v in ((1, "0.125"), (2, "0.25")) for n, v in (("loss", v), ("kl", "n/a"))],
    ] + [["2", "resumed", "2"], ["3", "loss", "9"]]
    again.write(4, {"loss": 8.0})
    assert rows(tmp_path)[-1] == ["4", "loss", "8"]  # said once
    assert read_log(tmp_path) == {"loss": ([1, 2, 3, 4], [0.125, 0.25, 9.0, 8.0]), "resumed": ([2], [2.0])}


def test_a_new_run_begins_a_new_log(tmp_path):
    RunLog(tmp_path, "phase", Config()).write(1, {"loss": 1.0})
    RunLog(tmp_path, "phase", Config())
    assert rows(tmp_path) == [["step", "name", "value"]]


@pytest.mark.parametrize("torn", ["3,lo", "3", "3,loss,", "\0\0\0", "three,loss,0.5"])
def test_a_line_cut_off_by_a_power_cut_does_not_stop_the_resumed_run(tmp_path, torn):
    RunLog(tmp_path, "phase", Config()).write(1, {"loss": 1.0})
    with open(tmp_path / "log.csv", "a") as file:
        file.write(torn)
    RunLog(tmp_path, "phase", Config(), from_step=5).write(6, {"loss": 0.5})
    assert read_log(tmp_path) == {"loss": ([1, 6], [1.0, 0.5]), "resumed": ([5], [5.0])}


def test_only_the_first_process_writes(tmp_path):
    log = RunLog(tmp_path / "run", "phase", Config(), enabled=False)
    log.write(1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()


def test_wandb_online_without_a_key_names_the_variable_before_anything_starts(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UsageError, match="WANDB_API_KEY is not set: export the key, or use --runtime.wandb offline"):
        runtime.start(RuntimeConfig(wandb="online"))


def test_wandb_offline_stays_in_the_run_folder_and_takes_numbers_only(tmp_path, monkeypatch):
    pytest.importorskip("wandb.sdk")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "val_000001.png").write_bytes(b"\x89PNG a patient")
    log = RunLog(tmp_path / "run", "phase", Config(runtime=RuntimeConfig(wandb="offline")))
    log.write(1, {"loss": 0.5, "kl": "n/a"})
    log.close()
    written = [path for path in (tmp_path / "run" / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written) and not list((tmp_path / "elsewhere").iterdir())
    assert not [
        path for path in written if path.suffix in (".png", ".jpg", ".npy", ".dcm", ".pt") or "media" in path.parts
    ]
    assert not any(
        secret in path.read_bytes()
        for path in written
        for secret in (b"a patient", b"./data", str(Path.home()).encode() + b"/")
    )


def test_meter_gives_means_since_the_last_flush():
    meter = Meter()
    meter.add({"loss": 1.0, "kl": "n/a"}, images=4)
    meter.add({"loss": torch.tensor(4.0, requires_grad=True), "id": 2.0}, images=4)
    first = meter.flush()
    assert first.pop("images_per_s") > 0 and first == {"loss": 2.5, "id": 2.0, "kl": "n/a"}
    meter.add({"loss": 7.0})
    assert meter.flush() == {"loss": 7.0}


def test_a_mean_over_images_weighs_a_smaller_batch_less():
    meter = Meter()
    for images in ([1.0, 2.0, 3.0], [7.0]):
        meter.add({"loss": torch.tensor(images).mean()}, weight=len(images))
    assert meter.flush() == {"loss": 3.25}


def test_a_sum_and_its_number_give_the_mean_and_nothing_where_there_is_none():
    meter = Meter()
    for total, count in ((3.0, 2.0), (0.0, 0.0), (6.0, 1.0)):
        meter.add({"bin": (torch.tensor(total), torch.tensor(count)), "empty": (torch.tensor(0.0), torch.tensor(0.0))})
    assert meter.flush() == {"bin": 3.0}


# ---------------------------------------------------------------- steps that may fail


def passed(guard, norms):
    return [guard.passes(step, torch.tensor(norm)) for step, norm in enumerate(norms, start=1)]


def test_a_gradient_that_is_not_finite_is_skipped_and_told_once(capsys):
    guard = StepGuard("vae.lr", limit=3, skipped=5)
    assert passed(guard, [1.0, math.nan, 2.0, math.inf, math.nan, 0.0]) == [True, False, True, False, False, True]
    assert guard.skipped == 8
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.split(":")[0] for line in said] == ["step 2", "step 4", "step 5"]


def test_too_many_in_a_row_end_the_run_and_name_the_remedy():
    guard = StepGuard("vae.lr", limit=3, quiet=True)
    with pytest.raises(UsageError, match="in the 3 steps up to 5: lower vae.lr, with --runtime.resume-changed True"):
        passed(guard, [math.nan, 1.0, math.nan, math.nan, math.nan])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_written(value):
    guard = StepGuard("vae.lr", limit=3)
    guard.check(1, {"weight": torch.ones(3)})
    with pytest.raises(UsageError, match="the weights are not finite at step 7: lower vae.lr"):
        guard.check(7, {"fine": torch.ones(3), "weight": torch.tensor([1.0, value])})
