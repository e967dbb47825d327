"""The command line: flags to numbers, errors in one line, and the line to paste next."""

import dataclasses
import shlex

import pytest

from checks import UsageError
from command_line import parse_command
from config import PREPROCESSING, SPLIT, DataConfig
from presets import preset


def artefact(**changes):
    """What a checkpoint hands on."""
    data = dataclasses.replace(DataConfig(), **changes)
    return {"preprocessing": data.preprocessing, "split": data.split}


def test_the_command_line_beats_the_preset_and_nothing_else_changes():
    line = "--vae.lr 1e-3 --preset cpu --unet.channels 32 64 --unet.attention False True --vae.freeze-encoder False"
    config, base = parse_command("", line.split()).config, preset("cpu")
    assert (config.vae.lr, config.vae.freeze_encoder) == (1e-3, False)
    assert (config.unet.channels, config.unet.attention) == ((32, 64), (False, True))
    assert dataclasses.replace(config, vae=base.vae, unet=base.unet) == base
    assert dataclasses.replace(config.vae, lr=base.vae.lr, freeze_encoder=True) == base.vae


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preset tpu", "unknown preset 'tpu': choose one of default, cpu, gpu, demo"),
        ("--preset", "--preset: expected one argument"),
        ("--outputs=", "--outputs is empty: give a folder"),
        ("--flowdiff.total-steps 9 --vae.steps abc", "--vae.steps takes a whole number, got abc"),
        ("--inference.noise-level 2", "inference.noise_level must lie in (0, 1), got 2.0"),
        ("--data.hieght 64", "unknown flag --data.hieght: did you mean --data.height?"),
        ("--preset-demo", "unknown flag --preset-demo: did you mean --preset?"),
        ("--vae.lr fast", "--vae.lr takes a number, got fast"),
        ("--vae.steps 1.5", "--vae.steps takes a whole number, got 1.5"),
        ("--vae.steps", "--vae.steps takes a whole number, got nothing"),
        ("--data.flip perhaps", "--data.flip takes True or False, got perhaps"),
        ("--inference.solver rk4", "--inference.solver takes one of one_step, euler, heun, ddim, got rk4"),
        ("./data", "./data stands alone: a value follows a flag"),
        ("--vae.lr 1e-3 ./data", "--vae.lr takes a number, got 1e-3 ./data"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_flag(line, message, capfd):
    with pytest.raises(UsageError) as refused:
        parse_command("", line.split())
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


def test_the_next_command_repeats_what_was_overridden():
    line = "--preset cpu --outputs 'my runs' --data.root ./x --runtime.resume False --vae.lr 1e-3".split(" --runtime")
    words = shlex.split(" --runtime".join(line))
    shown = parse_command("", words).next("extract_latents.py")
    assert shown == "python extract_latents.py --preset cpu --outputs 'my runs' --data.root ./x --vae.lr 1e-3"


def test_the_next_command_reads_where_this_phase_was_told_to_write():
    shown = parse_command("", ["--vae.output", "my vae", "--latent.vae-checkpoint", "x.pt"]).next("extract_latents.py")
    config = parse_command("", shlex.split(shown)[2:]).config
    assert (config.latent.vae_checkpoint, config.inference.vae_checkpoint) == ("x.pt", "my vae/checkpoint_best.pt")


def test_the_size_of_an_artefact_is_judged_by_its_own_unet():
    stored = artefact(height=48) | {"unet": {"channels": [16, 32], "attention": [False, True], "norm_groups": 16}}
    assert parse_command("", []).adopt(stored, "checkpoint_best.pt").unet.channels == (16, 32)


def test_the_next_command_pasted_gives_the_same_config():
    words = ["--preset", "demo", "--unet.channels", "32", "64", "64", "--data.root=a b", "--data.height", "64"]
    first = parse_command("", words)
    assert parse_command("", shlex.split(first.next("x.py"))[2:]).config == first.config


def test_preprocessing_and_split_are_those_of_the_artefact_whatever_the_config_says():
    stored = artefact(height=512, fit="pad", percentile_high=99.0, val_share=0.3, split_seed=5)
    adopted = parse_command("", []).adopt(stored, "checkpoint_best.pt").data
    assert {name: getattr(adopted, name) for name in PREPROCESSING} == stored["preprocessing"]
    assert {name: getattr(adopted, name) for name in SPLIT} == stored["split"]


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--data.height", "256"], "--data.height 256"), (["--data.split_seed=3"], "--data.split-seed 3")],
)
def test_a_flag_that_contradicts_the_artefact_is_refused_by_name(words, named):
    command = parse_command("", words)
    with pytest.raises(UsageError, match=f"{named} contradicts checkpoint_best.pt, made with"):
        command.adopt(artefact(height=512), "checkpoint_best.pt")


def test_a_flag_that_says_what_the_artefact_holds_is_no_contradiction():
    parse_command("", ["--data.height", "512"]).adopt(artefact(height=512), "checkpoint_best.pt")
