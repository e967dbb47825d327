"""The numbers the user fixed, the errors that name a field, and the command line."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import config as c
from checks import UsageError
from command_line import parse_command
from presets import PRESETS, TABLE, preset

ROOT = Path(__file__).parent.parent
PHASES = [
    getattr(c, name)
    for name in (
        "DataConfig",
        "VAEConfig",
        "LatentConfig",
        "UNetConfig",
        "FlowDiffTrainingConfig",
        "InferenceConfig",
        "CalibrationConfig",
    )
]
PHASES.append(c.RuntimeConfig)

FIXED = {
    c.VAEConfig: {
        "pretrained": "stabilityai/sd-vae-ft-mse",
        "freeze_encoder": True,
        "lambda_pix": 1.0,
        "lambda_grad": 0.5,
        "lambda_hf": 0.3,
        "lambda_ssim": 0.1,
        "beta_kl": 1e-6,
        "lr": 5e-5,
    },
    c.LatentConfig: {"vae_checkpoint": "./outputs/phase1_vae/checkpoint_best.pt"},
    c.FlowDiffTrainingConfig: {
        "lambda_diff": 1.0,
        "lambda_flow": 0.5,
        "lambda_id_global": 0.1,
        "identity_noise_level": 0.4,
        "phase1_steps": 100_000,
        "total_steps": 300_000,
        "identity_warmup_start": 90_000,
        "identity_warmup_end": 110_000,
    },
    c.InferenceConfig: {"noise_level": 0.4, "alpha_l1": 1.0, "beta_grad": 0.5, "gamma_hf": 0.3},
}


@pytest.mark.parametrize("phase", FIXED, ids=lambda phase: phase.__name__)
def test_names_and_defaults_the_user_fixed_stay(phase):
    values = dataclasses.asdict(phase())
    assert {name: values[name] for name in FIXED[phase]} == FIXED[phase]


@pytest.mark.parametrize("phase", [*PHASES, c.Config], ids=lambda phase: phase.__name__)
def test_configs_are_frozen(phase):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(phase(), dataclasses.fields(phase)[0].name, None)


def commented(phase):
    """Field name -> the comment on its line, or the one above it."""
    source = inspect.getsource(phase).split("def __post_init__")[0]
    beside = re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE)
    above = re.findall(r"^    # ([^\n]+)\n    (\w+): ", source, re.MULTILINE)
    return dict(beside) | {name: comment for comment, name in above}


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_every_field_says_what_turning_it_does(phase):
    assert set(commented(phase)) == {field.name for field in dataclasses.fields(phase)}


def test_every_comment_shows_up_in_help(capsys):
    with pytest.raises(SystemExit):
        parse_command("a phase", ["--help"])
    shown = re.sub(r"[^!-~]", "", capsys.readouterr().out)  # without frames and line breaks
    missing = [
        name
        for phase in PHASES
        for name, comment in commented(phase).items()
        if re.sub(r"[^!-~]", "", comment) not in shown
    ]
    assert not missing


def test_importing_config_loads_no_torch():
    heavy = "{'torch', 'numpy', 'diffusers', 'accelerate', 'tyro'}"
    result = subprocess.run(
        [sys.executable, "-c", f"import sys, config; print({heavy} & set(sys.modules))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "set()", result.stderr


BAD = [
    (c.DataConfig, "data.height", {"height": 0}),
    (c.DataConfig, "data.width", {"width": -8}),
    (c.DataConfig, "data.height", {"height": 10**30}),
    (c.DataConfig, "data.height", {"height": 10**400}),
    (c.DataConfig, "data.brightness", {"brightness": 1e308}),
    (c.DataConfig, "data.root", {"root": ""}),
    (c.VAEConfig, "vae.scratch_channels", {"scratch_channels": (0, 8)}),
    (c.VAEConfig, "vae.scratch_channels", {"scratch_channels": ()}),
    (c.DataConfig, "data.percentile_low", {"percentile_low": 60.0, "percentile_high": 40.0}),
    (c.DataConfig, "data.val_share", {"val_share": 1.0}),
    (c.DataConfig, "data.test_share", {"test_share": -0.1}),
    (c.DataConfig, "data.max_bad_share", {"max_bad_share": 1.1}),
    (c.DataConfig, "data.num_workers", {"num_workers": -1}),
    (c.DataConfig, "data.cache_disk_gb", {"cache_disk_gb": 1e300}),
    (c.UNetConfig, "unet.tile", {"tile": 1, "channels": (32,), "attention": (False,)}),
    (c.DataConfig, "data.gamma", {"gamma": float("nan")}),
    (c.VAEConfig, "vae.lambda_pix", {"lambda_pix": -1.0}),
    (c.VAEConfig, "vae.beta_kl", {"beta_kl": float("inf")}),
    (
        c.VAEConfig,
        "reconstruction weight",
        dict.fromkeys(("lambda_pix", "lambda_grad", "lambda_hf", "lambda_ssim"), 0.0),
    ),
    (c.VAEConfig, "vae.lr", {"lr": 0.0}),
    (c.VAEConfig, "vae.lr", {"lr": float("nan")}),
    (c.VAEConfig, "vae.steps", {"steps": 0}),
    (c.VAEConfig, "vae.pretrained", {"pretrained": ""}),
    (c.LatentConfig, "latent.batch_size", {"batch_size": 0}),
    (c.LatentConfig, "latent.augmented_copies", {"augmented_copies": -1}),
    (c.LatentConfig, "latent.outlier_std", {"outlier_std": 0.0}),
    (c.UNetConfig, "unet.channels", {"channels": (), "attention": ()}),
    (c.UNetConfig, "unet.channels", {"channels": (100, 256, 512)}),
    (c.UNetConfig, "unet.attention", {"attention": (True,)}),
    (c.UNetConfig, "unet.attention_head_dim", {"attention_head_dim": 48}),
    (c.UNetConfig, "unet.dropout", {"dropout": 1.0}),
    (c.UNetConfig, "unet.attention_head_dim", {"channels": (16,), "attention": (False,), "norm_groups": 8}),
    (c.FlowDiffTrainingConfig, "flowdiff.lambda_id_global", {"lambda_id_global": -0.1}),
    (c.FlowDiffTrainingConfig, "lambda_diff or lambda_flow", {"lambda_diff": 0.0, "lambda_flow": 0.0}),
    (c.FlowDiffTrainingConfig, "flowdiff.identity_noise_level", {"identity_noise_level": 1.0}),
    (c.FlowDiffTrainingConfig, "flowdiff.identity_share", {"identity_share": 0.0}),
    (c.FlowDiffTrainingConfig, "flowdiff.ema_decay", {"ema_decay": 1.0}),
    (c.FlowDiffTrainingConfig, "flowdiff.phase1_steps", {"phase1_steps": 400_000}),
    (c.FlowDiffTrainingConfig, "flowdiff.identity_warmup_start", {"identity_warmup_start": 120_000}),
    (c.InferenceConfig, "inference.noise_level", {"noise_level": 0.0}),
    (c.InferenceConfig, "inference.alpha_l1", {"alpha_l1": -1.0}),
    (c.InferenceConfig, "alpha_l1, beta_grad, gamma_hf", {"alpha_l1": 0.0, "beta_grad": 0.0, "gamma_hf": 0.0}),
    (c.InferenceConfig, "inference.top_share", {"top_share": 0.0}),
    (c.InferenceConfig, "inference.image_fpr", {"image_fpr": 1.0}),
    (c.InferenceConfig, "inference.pixel_fpr", {"pixel_fpr": 0.0}),
    (c.FlowDiffTrainingConfig, "flowdiff.identity_warmup_end", {"identity_warmup_end": 300_001}),
    (c.FlowDiffTrainingConfig, "flowdiff.lr", {"lr": float("inf")}),
    (c.UNetConfig, "unet.norm_groups", {"norm_groups": 0}),
    (c.DataConfig, "data.split_seed", {"split_seed": -1}),
    (c.CalibrationConfig, "calibration.levels", {"levels": (0.1, 1.0)}),
    (c.CalibrationConfig, "calibration.views", {"views": ()}),
    (c.CalibrationConfig, "calibration.blurs", {"blurs": (2.0,)}),
    (c.CalibrationConfig, "calibration.alignment", {"alignment": -0.1}),
    (c.CalibrationConfig, "calibration.regularization", {"regularization": 0.0}),
    (c.CalibrationConfig, "calibration.corrupted", {"corrupted": 0}),
    (c.CalibrationConfig, "calibration.least_change", {"least_change": 5.0}),
    (c.ReaderConfig, "reader.ema_decay", {"ema_decay": 1.0}),
    (c.CalibrationConfig, "calibration.largest_deviation", {"largest_deviation": 1e300}),
    (c.CalibrationConfig, "calibration.most_corruptions", {"most_corruptions": 10**20}),
    (c.LatentConfig, "latent.augmented_copies", {"augmented_copies": 10**12}),
    (c.CalibrationConfig, "calibration.smallest_corruption", {"smallest_corruption": 0.3}),
    (c.RuntimeConfig, "runtime.max_skipped_steps", {"max_skipped_steps": 0}),
    (c.InferenceConfig, "inference.figures", {"figures": -2}),
    (c.RuntimeConfig, "runtime.seed", {"seed": -1}),
    (c.RuntimeConfig, "runtime.checkpoint_every", {"checkpoint_every": 0}),
    (c.RuntimeConfig, "runtime.keep_every", {"keep_every": -1}),
    (c.RuntimeConfig, "runtime.keep_most", {"keep_most": 0}),
]


@pytest.mark.parametrize(
    ("phase", "named", "values"), BAD, ids=[f"{named}={list(values.values())}" for _, named, values in BAD]
)
def test_bad_values_are_refused_by_name(phase, named, values):
    with pytest.raises(UsageError, match=re.escape(named)):
        phase(**values)


@pytest.mark.parametrize(("size", "remedy"), [(250, "use 224 or 256"), (33, "use 32 or 64"), (8, "use 32")])
def test_an_indivisible_size_names_the_nearest_that_work(size, remedy):
    with pytest.raises(UsageError, match=rf"data.width = {size} does not divide by 32 .*{remedy}$"):
        c.Config(data=c.DataConfig(width=size))
    for number in map(int, re.findall(r"\d+", remedy)):
        c.Config(data=c.DataConfig(width=number))


def test_sizes_that_suit_a_shallow_unet_may_not_suit_a_deep_one():
    deep = c.UNetConfig(channels=(32,) * 5, attention=(False,) * 5)
    c.Config(data=c.DataConfig(height=96))
    with pytest.raises(UsageError, match="data.height = 96 does not divide by 128"):
        c.Config(data=c.DataConfig(height=96), unet=deep)


def test_an_identity_constraint_switched_off_may_have_any_schedule():
    c.FlowDiffTrainingConfig(total_steps=10, phase1_steps=5, lambda_id_global=0.0)


@pytest.mark.parametrize("area", [0.0002, 0.0007, 0.01])
def test_a_perfect_map_has_the_dice_that_pixel_fpr_promises(area):
    """The comment beside the setting: every lesion pixel flagged, and pixel_fpr of all others."""
    lesion, flagged = area, area + c.InferenceConfig().pixel_fpr
    assert 2 * lesion / (lesion + flagged) > (0.5 if area >= 0.0005 else 0.25)


# ---------------------------------------------------------------- presets


def paths_of(config):
    outputs = ("phase", "calibration", "cache")
    return {
        f"{phase}.{name}": value
        for phase, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
        if isinstance(value, str) and value.rsplit("/", 2)[-1 if "." not in value[-4:] else -2].startswith(outputs)
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_construct_and_keep_every_path_in_one_folder(name):
    folder = "./outputs" if name == "default" else f"./outputs/{name}"
    paths = paths_of(preset(name))
    assert len(paths) == 11 and all(path.startswith(f"{folder}/") for path in paths.values())


def test_the_preset_of_a_gpu_is_what_the_table_was_measured_with():
    """But for the size, which detection.py names beside these flags, and what shapes no result."""
    asked = json.loads((ROOT / "benchmarks/results/detection-h100/reader-512-seed0.json").read_text())["asked"]
    measured = parse_command("", [*asked["flags"], "--data.height", "512", "--data.width", "512", "--outputs", "here"])
    given = parse_command("", ["--preset", "gpu", "--outputs", "here", "--vae.pretrained", "taesd"])
    measured, given = dataclasses.asdict(measured.config), dataclasses.asdict(given.config)
    differs = {
        f"{phase}.{name}" for phase in given for name in given[phase] if given[phase][name] != measured[phase][name]
    }
    assert differs == {"data.num_workers", "flowdiff.sample_every"}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("folder", ["/elsewhere/run7", "run7/"])
def test_outputs_moves_every_path(name, folder):
    paths = paths_of(parse_command("", ["--preset", name, "--outputs", folder]).config)
    assert len(paths) == 11 and all(path.startswith(folder.rstrip("/") + "/") for path in paths.values())


def test_the_table_names_fields_that_exist_and_differ_from_the_default():
    base = dataclasses.asdict(c.Config())
    for path, *values in TABLE:
        phase, name = path.split(".")
        assert name in base[phase] and all(value != base[phase][name] for value in values)


def test_what_one_phase_writes_is_what_the_next_reads():
    for name in PRESETS:
        config = preset(name, "somewhere")
        vae, flow = (f"{phase.output}/checkpoint_best.pt" for phase in (config.vae, config.flowdiff))
        assert {phase.vae_checkpoint for phase in (config.latent, config.flowdiff, config.inference)} == {vae}
        assert (config.flowdiff.latents, config.inference.flow_checkpoint) == (config.latent.output, flow)
