"""Phases 1 and 3 interrupted, changed, taken up again or begun anew."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from pipeline import ENVIRONMENT, ROOT, flags_of, sources
from torch import nn

import train_flowdiff
import train_vae
from files import load_checkpoint, sha256
from holding import hold
from radiographs.manifest import list_records
from run_log import read_log

MODULES = {"train_vae": train_vae, "train_flowdiff": train_flowdiff}
PLACES = {"train_vae": "phase1_vae", "train_flowdiff": "phase3_flowdiff"}
QUICK = ["--flowdiff.validate-every", 8, "--flowdiff.sample-every", 8]  # no pictures on the way


def last(outputs, script):
    return torch.load(outputs / PLACES[script] / "checkpoint_last.pt", weights_only=True)


def learnt(content):
    """What training changed, of a checkpoint_last.pt."""
    parts = {name: content[name] for name in ("weights", "ema") if name in content}
    return parts | {"optimizer": content["optimizer"]["state"]}


# ---------------------------------------------------------------- stopped and taken up again


def train_until_killed(script, flags, checkpoint):
    """Kill -9 as soon as there is something to resume from; the step it had reached."""
    command = [sys.executable, f"{script}.py", *flags]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    error = process.communicate()[1].decode()
    assert checkpoint.exists(), error
    return torch.load(checkpoint, weights_only=True)["step"]


LONGER = {
    "train_vae": ["--vae.steps", 20, "--vae.validate-every", 10, "--runtime.checkpoint-every", 4],
    "train_flowdiff": [
        *("--flowdiff.total-steps", 30, "--flowdiff.phase1-steps", 10),
        *("--flowdiff.identity-warmup-start", 5, "--flowdiff.identity-warmup-end", 20),
        *("--flowdiff.validate-every", 15, "--flowdiff.sample-every", 30, "--runtime.checkpoint-every", 4),
    ],
}
TOTAL = {"train_vae": 20, "train_flowdiff": 30}


def same_end(script, broken, whole):
    """Whether two runs ended in the same weights, the same best weights and the same log, to the last bit."""
    torch.testing.assert_close(learnt(last(broken, script)), learnt(last(whole, script)), rtol=0, atol=0)
    ours, theirs = (
        torch.load(folder / PLACES[script] / "checkpoint_best.pt", weights_only=True) for folder in (broken, whole)
    )
    assert ours["step"] == theirs["step"] and ours["scores"] == theirs["scores"]
    torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=0, atol=0)
    assert lasting(broken / PLACES[script]) == lasting(whole / PLACES[script])


def lasting(folder):
    """The rows of log.csv; means over a stretch that the interruption cut in two are its own business."""
    kept = ("val/", "train/lr", "train/lambda_id", "train/skipped_steps")
    return {name: series for name, series in read_log(folder).items() if name.startswith(kept)}


@pytest.mark.parametrize("script", PLACES)
def test_a_killed_run_taken_up_again_ends_where_an_uninterrupted_one_does(script, call, made, tmp_path):
    whole, broken, longer = tmp_path / "whole", tmp_path / "broken", LONGER[script]
    words = flags_of(broken, made.phantoms, *sources(script, made), *longer)
    step = train_until_killed(script, words, broken / PLACES[script] / "checkpoint_last.pt")
    assert 0 < step < TOTAL[script]
    resumed = call(script, *longer, outputs=broken)
    assert resumed.code == 0 and f"continuing from step {step} of {TOTAL[script]}" in resumed.out
    assert call(script, *longer, outputs=whole).code == 0
    same_end(script, broken, whole)


@pytest.fixture
def interrupt(call, monkeypatch):
    """Run a phase here and press Ctrl-C as soon as checkpoint_last.pt is written."""

    def interrupt(script, *flags, **places):
        real = MODULES[script].save_checkpoint

        def save(path, kind, content):
            real(path, kind, content)
            if path.name == "checkpoint_last.pt":
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(MODULES[script], "save_checkpoint", save)
            result = call(script, *flags, **places)
        assert result.code == 130 and result.error.startswith("interrupted")

    return interrupt


def test_images_augmented_on_the_device_are_the_same_in_a_resumed_run_and_stay_there(interrupt, call, tmp_path):
    whole, broken, there = tmp_path / "whole", tmp_path / "broken", ["--data.augment-on", "device"]
    interrupt("train_vae", *LONGER["train_vae"], *there, outputs=broken)
    for outputs in (broken, whole):
        assert call("train_vae", *LONGER["train_vae"], *there, outputs=outputs).code == 0
    same_end("train_vae", broken, whole)
    refused = call("train_vae", *LONGER["train_vae"], outputs=broken)
    assert refused.code == 2 and "(data.augment_on was device, now not set)" in refused.error


class Dropout(nn.Dropout):
    """Dropout that remembers the mode of every forward pass with a gradient."""

    modes = []

    def forward(self, x):
        if torch.is_grad_enabled():
            Dropout.modes.append(self.training)
        return super().forward(x)


def vae_with_dropout(monkeypatch):
    """A VAE that behaves otherwise in training, and comes in eval mode as one from a folder does."""
    real = train_vae.pretrained_vae

    def pretrained_vae(settings):
        vae = real(settings)
        vae.autoencoder.decoder.conv_out = nn.Sequential(Dropout(0.3), vae.autoencoder.decoder.conv_out)
        return vae.eval()

    monkeypatch.setattr(train_vae, "pretrained_vae", pretrained_vae)
    return []


DROPOUT = {"train_vae": vae_with_dropout, "train_flowdiff": lambda monkeypatch: ["--unet.dropout", 0.1]}


@pytest.mark.parametrize("script", PLACES)
def test_dropout_draws_the_same_in_a_resumed_run(script, interrupt, call, monkeypatch, tmp_path):
    flags = [*DROPOUT[script](monkeypatch), *LONGER[script]]
    interrupt(script, *flags, outputs=tmp_path / "broken")
    assert last(tmp_path / "broken", script)["step"] == 4
    for name in ("broken", "whole"):
        assert call(script, *flags, outputs=tmp_path / name).code == 0
    same_end(script, tmp_path / "broken", tmp_path / "whole")


def test_every_step_is_taken_in_the_mode_of_training(interrupt, call, monkeypatch, tmp_path):
    """Before and after a validation, and from the first step of a resumed run."""
    Dropout.modes.clear()
    flags = [*vae_with_dropout(monkeypatch), "--vae.steps", 6, "--vae.validate-every", 2]
    interrupt("train_vae", *flags, "--runtime.checkpoint-every", 3)
    assert call("train_vae", *flags).code == 0
    assert Dropout.modes == [True] * 6


@pytest.mark.parametrize(("script", "kind"), [("train_vae", "vae"), ("train_flowdiff", "flowdiff")])
def test_checkpoints_on_the_way_are_kept_up_to_a_number(script, kind, call, made, tmp_path):
    """A later phase can read them; a resumed run keeps the same ones."""
    kept = ["--runtime.keep-every", 2, "--runtime.keep-most", 2, *QUICK]
    assert call(script, *kept).code == 0
    last_step = {"train_vae": 6, "train_flowdiff": 8}[script]
    folder = tmp_path / PLACES[script]
    steps = [load_checkpoint(path, kind, "")["step"] for path in sorted(folder.glob("checkpoint_step_*.pt"))]
    assert steps == [last_step - 2, last_step]
    known = load_checkpoint(folder / "checkpoint_best.pt", kind, "")
    assert load_checkpoint(folder / f"checkpoint_step_{last_step:06d}.pt", kind, "").keys() == known.keys()
    assert call(script, "--runtime.resume", "False", *QUICK).code == 0
    assert not list(folder.glob("checkpoint_step_*.pt"))


def test_a_finished_run_started_again_changes_nothing(call, made, tmp_path):
    out = shutil.copytree(made.phase3, tmp_path / "phase3_flowdiff")
    before = sha256(out / "checkpoint_best.pt"), (out / "log.csv").read_text()
    assert call("train_flowdiff").code == 0
    assert (sha256(out / "checkpoint_best.pt"), (out / "log.csv").read_text()) == before


# ---------------------------------------------------------------- not the same run any more


@pytest.mark.parametrize(
    ("script", "flag", "value", "named"),
    [
        ("train_vae", "--vae.lambda-grad", 0.1, "vae.lambda_grad was 0.5, now 0.1"),
        ("train_vae", "--data.flip", "False", "data.flip was True, now False"),
        ("train_vae", "--data.augment-on", "device", "data.augment_on was not set, now device"),
        ("train_flowdiff", "--flowdiff.lambda-flow", 0.7, "flowdiff.lambda_flow was 0.5, now 0.7"),
        ("train_flowdiff", "--unet.dropout", 0.1, "unet.dropout was 0.0, now 0.1"),
        ("train_flowdiff", "--runtime.seed", 5, "runtime.seed was 0, now 5"),
    ],
)
def test_a_changed_config_does_not_resume_and_names_the_field(script, flag, value, named, call, made):
    result = call(script, flag, value, outputs=made.out)
    assert result.code == 2 and f"({named})" in result.error and "--runtime.resume False" in result.error
    assert "resume-changed" not in result.error


@pytest.mark.parametrize("script", PLACES)
def test_another_precision_does_not_resume(script, call, made, monkeypatch):
    monkeypatch.setattr(MODULES[script], "precision_of", lambda accelerator: "bf16")
    result = call(script, outputs=made.out)
    assert result.code == 2 and "(precision was float32, now bf16)" in result.error


def test_a_moved_folder_is_no_change_and_a_changed_file_is(call, made, tmp_path):
    moved = shutil.copytree(made.phantoms, tmp_path / "moved")
    shutil.copytree(made.phase1, tmp_path / "phase1_vae")
    result = call("train_vae", data=moved)
    assert result.code == 0 and "continuing from step 6 of 6" in result.out
    first, second = [record.path for record in list_records(moved) if record.split == "train"][:2]
    shutil.copyfile(first, second)
    result = call("train_vae", data=moved)
    assert result.code == 2 and "(the training radiographs changed)" in result.error


def test_other_latents_do_not_resume(call, made, tmp_path):
    assert call("extract_latents", "--runtime.seed", 3).code == 0  # other augmentation
    result = call("train_flowdiff", "--flowdiff.latents", tmp_path / "phase2_latents", outputs=made.out)
    assert result.code == 2 and "(the training latents changed)" in result.error


MORE = {
    "train_vae": ["--vae.steps", 9, "--vae.lr", 1e-5],
    "train_flowdiff": ["--flowdiff.total-steps", 12, "--flowdiff.identity-warmup-end", 10, "--flowdiff.lr", 1e-5],
}


@pytest.mark.parametrize("script", PLACES)
def test_a_longer_run_at_a_lower_rate_is_a_flag(script, call, made, tmp_path):
    shutil.copytree(made.out / PLACES[script], tmp_path / PLACES[script])
    refused = call(script, *MORE[script])
    assert refused.code == 2 and "--runtime.resume-changed True" in refused.error
    assert call(script, *MORE[script], "--runtime.resume-changed", "True").code == 0
    assert last(tmp_path, script)["step"] == {"train_vae": 9, "train_flowdiff": 12}[script]
    if script == "train_flowdiff":  # what was the best under the old schedule had not the full weight of the new one
        assert load_checkpoint(tmp_path / PLACES[script] / "checkpoint_best.pt", "flowdiff", "")["step"] == 12


def test_fewer_steps_than_taken_are_refused(call, made):
    result = call("train_vae", "--vae.steps", 4, "--runtime.resume-changed", "True", outputs=made.out)
    assert result.code == 2 and "has taken 6 steps already, and 4 are asked for" in result.error


# ---------------------------------------------------------------- anew


STALE = {"train_vae": ("val_000999.png",), "train_flowdiff": ("samples_000999.png", "normals_000999.png")}


def soiled(made, script, folder):
    """A copy of what a phase left, with pictures of a later step and a file of the user's."""
    out = shutil.copytree(made.out / PLACES[script], folder / PLACES[script])
    for name in (*STALE[script], "notes.txt"):
        (out / name).write_text("of an earlier run")
    return out


@pytest.mark.parametrize("script", PLACES)
def test_starting_anew_removes_the_files_of_the_earlier_run(script, interrupt, made, tmp_path):
    out = soiled(made, script, tmp_path)
    every = ["--runtime.checkpoint-every", 1, "--flowdiff.phase1-steps", 8]
    interrupt(script, *every, *QUICK, "--runtime.resume", "False")
    assert last(tmp_path, script)["step"] == 1
    left = {path.name for path in out.iterdir()}
    assert left - {"checkpoint_last.pt", "log.csv", "config.json", "notes.txt", ".training.lock"} == (
        {"checkpoint_best.pt", "val_000000.png"} if script == "train_vae" else set()
    )
    assert (out / "notes.txt").exists()


@pytest.mark.parametrize(
    ("script", "wrong"),
    [
        ("train_vae", ["--data.root", "/nowhere"]),
        ("train_vae", ["--vae.pretrained", "./nowhere"]),
        ("train_flowdiff", ["--flowdiff.latents", "/nowhere"]),
        ("train_flowdiff", ["--runtime.wandb", "online"]),
    ],
)
def test_nothing_is_removed_before_all_checks_are_passed(script, wrong, call, made, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    out = soiled(made, script, tmp_path)
    before = {path.name: sha256(path) for path in out.iterdir()}
    assert call(script, *wrong, "--runtime.resume", "False").code == 2
    assert {path.name: sha256(path) for path in out.iterdir()} == before


@pytest.mark.parametrize("script", PLACES)
def test_two_runs_on_one_folder_are_one_too_many(script, call, made, tmp_path):
    out = soiled(made, script, tmp_path)
    with hold(out, "training"):
        before = {path.name: sha256(path) for path in out.iterdir()}
        result = call(script, "--runtime.resume", "False")
        assert result.code == 2 and f"(process {os.getpid()} on " in result.error
        assert {path.name: sha256(path) for path in out.iterdir()} == before
    assert call(script, "--runtime.resume", "False").code == 0
