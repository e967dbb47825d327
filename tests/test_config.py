"""The numbers the user fixed, the errors that name a field, and the command line."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import config as c
from command_line import parse_config

ROOT = Path(__file__).parent.parent
PHASES = [
    getattr(c, name)
    for name in ("DataConfig", "VAEConfig", "LatentConfig", "UNetConfig", "FlowDiffTrainingConfig", "InferenceConfig")
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
    """Field name -> the comment on its line."""
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(phase), re.MULTILINE))


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_every_field_says_on_its_line_what_turning_it_does(phase):
    assert set(commented(phase)) == {field.name for field in dataclasses.fields(phase)}


def test_every_comment_shows_up_in_help(capsys):
    with pytest.raises(SystemExit):
        parse_config("a phase", ["--help"])
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
    (c.DataConfig, "data.percentile_low", {"percentile_low": 60.0, "percentile_high": 40.0}),
    (c.DataConfig, "data.val_share", {"val_share": 1.0}),
    (c.DataConfig, "data.test_share", {"test_share": -0.1}),
    (c.DataConfig, "data.max_bad_share", {"max_bad_share": 1.1}),
    (c.DataConfig, "data.num_workers", {"num_workers": -1}),
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
    (c.InferenceConfig, "inference.target_fpr", {"target_fpr": 1.0}),
    (c.InferenceConfig, "inference.figures", {"figures": -2}),
    (c.RuntimeConfig, "runtime.seed", {"seed": -1}),
    (c.RuntimeConfig, "runtime.checkpoint_every", {"checkpoint_every": 0}),
]


@pytest.mark.parametrize(
    ("phase", "named", "values"), BAD, ids=[f"{named}={list(values.values())}" for _, named, values in BAD]
)
def test_bad_values_are_refused_by_name(phase, named, values):
    with pytest.raises(c.UsageError, match=re.escape(named)):
        phase(**values)


@pytest.mark.parametrize(("size", "remedy"), [(250, "use 224 or 256"), (33, "use 32 or 64"), (8, "use 32")])
def test_an_indivisible_size_names_the_nearest_that_work(size, remedy):
    with pytest.raises(c.UsageError, match=rf"data.width = {size} does not divide by 32 .*{remedy}$"):
        c.Config(data=c.DataConfig(width=size))
    for number in map(int, re.findall(r"\d+", remedy)):
        c.Config(data=c.DataConfig(width=number))


def test_sizes_that_suit_a_shallow_unet_may_not_suit_a_deep_one():
    deep = c.UNetConfig(channels=(32,) * 5, attention=(False,) * 5)
    c.Config(data=c.DataConfig(height=96))
    with pytest.raises(c.UsageError, match="data.height = 96 does not divide by 128"):
        c.Config(data=c.DataConfig(height=96), model=deep)


def paths_of(config):
    return {
        f"{phase}.{name}": value
        for phase, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
        if "phase" in str(value)
    }


@pytest.mark.parametrize("name", c.PRESETS)
def test_presets_construct_and_keep_every_path_in_one_folder(name):
    folder = "./outputs" if name == "default" else f"./outputs/{name}"
    paths = paths_of(c.preset(name))
    assert len(paths) == 9 and all(path.startswith(f"{folder}/phase") for path in paths.values())


@pytest.mark.parametrize("name", c.PRESETS)
@pytest.mark.parametrize("folder", ["/elsewhere/run7", "run7/"])
def test_outputs_moves_every_path(name, folder):
    paths = paths_of(parse_config("", ["--preset", name, "--outputs", folder]))
    assert len(paths) == 9 and all(path.startswith(folder.rstrip("/") + "/phase") for path in paths.values())


def test_what_one_phase_writes_is_what_the_next_reads():
    for name in c.PRESETS:
        config = c.preset(name, "somewhere")
        best = [f"{phase.output}/checkpoint_best.pt" for phase in (config.vae, config.flowdiff)]
        assert [config.latent.vae_checkpoint, config.flowdiff.vae_checkpoint, config.inference.vae_checkpoint] == [
            best[0]
        ] * 3
        assert config.flowdiff.latents == config.latent.output and config.inference.flow_checkpoint == best[1]


def test_the_command_line_beats_the_preset_and_nothing_else_changes():
    line = [
        "--vae.lr",
        "1e-3",
        "--preset",
        "cpu",
        "--unet.channels",
        "32",
        "64",
        "--unet.attention",
        "False",
        "True",
        "--vae.freeze-encoder",
        "False",
    ]
    config, base = parse_config("", line), c.preset("cpu")
    assert (config.vae.lr, config.unet.channels, config.unet.attention, config.vae.freeze_encoder) == (
        1e-3,
        (32, 64),
        (False, True),
        False,
    )
    assert dataclasses.replace(config, vae=base.vae, unet=base.unet) == base
    assert dataclasses.replace(config.vae, lr=base.vae.lr, freeze_encoder=True) == base.vae


def test_an_unknown_preset_is_a_usage_error_that_lists_the_known():
    with pytest.raises(c.UsageError, match="'gpu': choose one of default, cpu, demo"):
        parse_config("", ["--preset", "gpu"])


def test_a_bad_value_on_the_command_line_is_a_usage_error():
    with pytest.raises(c.UsageError, match="inference.noise_level"):
        parse_config("", ["--inference.noise-level", "2"])


def test_an_unknown_flag_ends_the_program(capsys):
    with pytest.raises(SystemExit) as end:
        parse_config("", ["--vae.learning-rate", "1"])
    assert end.value.code == 2 and "vae.learning-rate" in capsys.readouterr().err
