"""What every phase leans on: reproducible order and noise, files that appear whole, checkpoints that refuse to be misread."""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

import runtime
from config import Config, RuntimeConfig, UsageError, VAEConfig
from files import FORMAT, load_checkpoint, save_checkpoint, sha256, write_atomically, write_json
from runtime import (
    Meter,
    RunLog,
    StepBatches,
    build_ema,
    generator,
    learning_rate,
    plain,
    read_log,
    resume_point,
    run_script,
)

MADE_BY = "python phase.py"


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
    ema, expected = build_ema(model, decay), None
    for n in range(30):
        torch.nn.init.normal_(model.weight)
        ema.update_parameters(model)
        current = min(decay, (1 + n) / (10 + n))
        expected = (
            model.weight.detach().clone() if n == 0 else current * expected + (1 - current) * model.weight.detach()
        )
    torch.testing.assert_close(ema.module.weight, expected)


def test_ema_holds_no_gradient_and_does_not_touch_the_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout())
    before = model[0].weight.detach().clone()
    ema = build_ema(model, 0.9)
    ema.update_parameters(model)
    assert not any(weight.requires_grad for weight in ema.parameters()) and not ema.module.training
    assert model[0].weight.requires_grad and model.training and torch.equal(model[0].weight, before)


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
    [(UsageError("do this"), 2, "error: do this\n"), (KeyboardInterrupt(), 130, "error: interrupted")],
)
def test_what_the_user_can_mend_is_one_line_and_a_code(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main)
    shown = capsys.readouterr().err
    assert end.value.code == code and shown.startswith(line) and shown.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def test_cuda_without_a_gpu_names_the_way_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--runtime.device cpu"):
        runtime.start(RuntimeConfig(device="cuda"))


# ---------------------------------------------------------------- files that appear whole


def half_then_fail(path):
    path.write_text("ha")
    raise OSError("disk full")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "x.txt", lambda path: path.write_text("old"))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "x.txt", half_then_fail)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x.txt": "old"}


def test_a_file_is_flushed_before_it_takes_its_place(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(runtime.os, name, lambda *args, name=name, real=real: (order.append(name), real(*args)))
    write_atomically(tmp_path / "new" / "x.txt", lambda path: path.write_text("whole"))
    assert order == ["fsync", "replace"] and (tmp_path / "new" / "x.txt").read_text() == "whole"


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"auroc": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_sha256_is_that_of_the_standard(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_reads_back(tmp_path):
    save_checkpoint(tmp_path / "x.pt", "vae", {"weights": {"w": torch.arange(3.0)}, "step": 7})
    content = load_checkpoint(tmp_path / "x.pt", "vae", MADE_BY)
    assert (content["format"], content["kind"], content["step"]) == (FORMAT, "vae", 7) and content["weights"][
        "w"
    ].tolist() == [0, 1, 2]


class Malice:
    """What a hostile .pt holds: unpickling it runs a command."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (self.witness,)


def truncated(path):
    save_checkpoint(path, "vae", {"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000])


SPOILT = {
    "missing": (lambda path: None, "is missing: run python phase.py first"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read .*run python phase.py again"),
    "garbage": (lambda path: path.write_bytes(b"not a checkpoint"), "cannot be read .*run python phase.py again"),
    "truncated": (truncated, "cannot be read .*run python phase.py again"),
    "wrong kind": (
        lambda path: save_checkpoint(path, "flowdiff", {}),
        "is no vae checkpoint: give the file that python phase.py wrote",
    ),
    "a bare tensor": (
        lambda path: torch.save(torch.zeros(3), path),
        "is no vae checkpoint: give the file that python phase.py wrote",
    ),
    "a state dict": (
        lambda path: torch.save({"weight": torch.zeros(3)}, path),
        "is no vae checkpoint: give the file that python phase.py wrote",
    ),
    "newer format": (
        lambda path: torch.save({"kind": "vae", "format": FORMAT + 1}, path),
        f"has format {FORMAT + 1}, this code reads {FORMAT}: use the",
    ),
    "no format": (lambda path: torch.save({"kind": "vae"}, path), "run python phase.py again"),
    "a folder": (lambda path: path.mkdir(), "python phase.py"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_checkpoint_is_refused_with_the_remedy(name, tmp_path):
    spoil, remedy = SPOILT[name]
    spoil(tmp_path / "x.pt")
    with pytest.raises(UsageError, match=f"x.pt {remedy}" if remedy[:3] != "run" and name != "a folder" else remedy):
        load_checkpoint(tmp_path / "x.pt", "vae", MADE_BY)


def test_code_hidden_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({"kind": "vae", "format": FORMAT, "weights": Malice(str(tmp_path / "witness"))}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="cannot be read"):
        load_checkpoint(tmp_path / "x.pt", "vae", MADE_BY)
    assert not (tmp_path / "witness").exists()
    torch.load(tmp_path / "x.pt", weights_only=False)  # it would have
    assert (tmp_path / "witness").exists()


def test_a_config_in_a_checkpoint_is_plain_and_survives(tmp_path):
    save_checkpoint(tmp_path / "x.pt", "vae", {"config": plain(Config())})
    stored = load_checkpoint(tmp_path / "x.pt", "vae", MADE_BY)["config"]
    assert stored == json.loads(json.dumps(stored)) == plain(Config())


def test_resuming_is_a_choice_and_needs_a_file(tmp_path):
    assert resume_point(tmp_path / "x.pt", "vae", {}, True, MADE_BY) is None
    save_checkpoint(tmp_path / "x.pt", "vae", {"config": {"a": 1}, "step": 3})
    assert resume_point(tmp_path / "x.pt", "vae", {"a": 2}, False, MADE_BY) is None
    assert resume_point(tmp_path / "x.pt", "vae", {"a": 1}, True, MADE_BY)["step"] == 3


def test_a_changed_config_names_every_field_that_differs(tmp_path):
    old, new = (
        plain(Config(vae=VAEConfig(lr=lr, steps=steps), runtime=RuntimeConfig(seed=seed)))
        for lr, steps, seed in ((1.0, 5, 0), (2.0, 6, 4))
    )
    save_checkpoint(tmp_path / "x.pt", "vae", {"config": {**old, "gone": 1}})
    with pytest.raises(UsageError) as refusal:
        resume_point(tmp_path / "x.pt", "vae", {**new, "added": 2}, True, MADE_BY)
    text = str(refusal.value)
    for difference in (
        "vae.lr was 1.0, now 2.0",
        "vae.steps was 5, now 6",
        "runtime.seed was 0, now 4",
        "gone was 1",
        "added was None, now 2",
    ):
        assert difference in text
    assert text.count(" was ") == 6 and "--runtime.resume False" in text  # five fields, and "was written"


# ---------------------------------------------------------------- log


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.reader(file))


def test_a_resumed_log_reads_as_if_nothing_had_happened(tmp_path):
    log = RunLog(tmp_path, "phase", Config())
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": step / 8, "kl": "n/a"})
    again = RunLog(tmp_path, "phase", Config(), from_step=2)
    again.write(3, {"loss": 9.0})
    assert rows(tmp_path) == [
        ["step", "name", "value"],
        *[[str(s), n, v] for s, v in ((1, "0.125"), (2, "0.25")) for n, v in (("loss", v), ("kl", "n/a"))],
    ] + [["3", "loss", "9"]]
    assert read_log(tmp_path) == {"loss": ([1, 2, 3], [0.125, 0.25, 9.0])}


def test_a_new_run_begins_a_new_log(tmp_path):
    RunLog(tmp_path, "phase", Config()).write(1, {"loss": 1.0})
    RunLog(tmp_path, "phase", Config())
    assert rows(tmp_path) == [["step", "name", "value"]]


@pytest.mark.parametrize("torn", ["3,lo", "3", "3,loss,"])
def test_a_line_cut_off_by_a_power_cut_does_not_stop_the_resumed_run(tmp_path, torn):
    RunLog(tmp_path, "phase", Config()).write(1, {"loss": 1.0})
    with open(tmp_path / "log.csv", "a") as file:
        file.write(torn)
    RunLog(tmp_path, "phase", Config(), from_step=5).write(6, {"loss": 0.5})
    assert read_log(tmp_path) == {"loss": ([1, 6], [1.0, 0.5])}


def test_only_the_first_process_writes(tmp_path):
    log = RunLog(tmp_path / "run", "phase", Config(), enabled=False)
    log.write(1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()


def test_wandb_online_without_a_key_names_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UsageError, match="WANDB_API_KEY is not set: export the key, or use --runtime.wandb offline"):
        RunLog(tmp_path, "phase", Config(runtime=RuntimeConfig(wandb="online")))


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
    meter.add({"loss": torch.tensor(4.0), "id": 2.0}, images=4)
    first = meter.flush()
    assert first.pop("images_per_s") > 0 and first == {"loss": 2.5, "id": 2.0}
    meter.add({"loss": 7.0})
    assert meter.flush() == {"loss": 7.0}
