"""Leaf: the presets, as a table of what differs from the defaults of config.py, and --outputs, which moves paths."""

import dataclasses

from checks import UsageError
from config import Config

SAME = object()  # as in the default
# cpu: two cores, about two hours for some hundred radiographs. demo: phantoms, minutes on two cores.
# fmt: off
TABLE = (
    # field                           cpu                      demo
    ("data.root",                     SAME,                    "./outputs/phantoms"),
    ("data.height",                   SAME,                    128),
    ("data.percentile_low",           SAME,                    0.5),
    ("data.percentile_high",          SAME,                    99.5),
    ("data.num_workers",              0,                       0),
    ("data.flip",                     SAME,                    True),
    ("data.rotate_degrees",           SAME,                    1.5),
    ("vae.pretrained",                "madebyollin/taesd",     "./assets/phantom_vae"),
    ("vae.lr",                        3e-4,                    2e-4),
    ("vae.lr_warmup_steps",           30,                      10),
    ("vae.batch_size",                4,                       4),
    ("vae.steps",                     900,                     60),
    ("vae.crop",                      128,                     SAME),  # 450 steps on whole images take twice as long
    ("vae.validate_every",            150,                     30),
    ("vae.log_every",                 25,                      10),
    ("latent.augmented_copies",       SAME,                    2),
    ("unet.channels",                 (64, 128, 192),          (64, 128, 128)),
    ("unet.layers_per_block",         1,                       1),
    ("unet.attention",                (False, False, True),    (False, False, True)),
    ("unet.norm_groups",              16,                      16),
    ("flowdiff.identity_space",       "latent",                "latent"),
    ("flowdiff.phase1_steps",         1_200,                   300),
    ("flowdiff.total_steps",          1_600,                   400),
    ("flowdiff.identity_warmup_start", 1_200,                  260),
    ("flowdiff.identity_warmup_end",  1_350,                   300),
    ("flowdiff.batch_size",           16,                      16),
    ("flowdiff.lr",                   4e-4,                    5e-4),
    ("flowdiff.lr_warmup_steps",      100,                     50),
    ("flowdiff.ema_decay",            0.998,                   0.995),
    ("flowdiff.validate_every",       200,                     100),
    ("flowdiff.sample_every",         800,                     400),
    ("flowdiff.log_every",            50,                      50),
    ("inference.precision",           "auto",                  SAME),
    ("inference.solver",              SAME,                    "one_step"),
    ("inference.draws",               SAME,                    2),
    ("inference.top_share",           SAME,                    0.002),
    ("inference.figures",             SAME,                    14),
    ("calibration.blurs",             SAME,                    (0.008, 0.016, 0.032)),
    ("calibration.alignment",         SAME,                    0.024),
    ("reader.copies",                 1,                       2),
    ("reader.mirror",                 SAME,                    False),  # phantoms' sides are drawn apart
    ("reader.members",                1,                       1),
    ("reader.steps",                  1_000,                   2_700),
    ("reader.tuned_steps",            1_200,                   0),
    ("reader.fewest_corruptions",     SAME,                    4),
    ("reader.most_corruptions",       SAME,                    10),
    ("reader.residual_weight",        SAME,                    1.0),  # it sees implants; seeds 8 and 9 say so
    ("runtime.device",                "cpu",                   "cpu"),
    ("runtime.checkpoint_every",      150,                     100),
)
# fmt: on
PRESETS = {"default": "./outputs", "cpu": "./outputs/cpu", "demo": "./outputs/demo"}  # name -> where its files go


def preset(name: str, outputs: str | None = None) -> Config:
    """A preset by name, its paths below `outputs` or below a folder of its own; UsageError for an unknown name."""
    if outputs == "":
        raise UsageError("--outputs is empty: give a folder")
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    columns = {"default": None, "cpu": 1, "demo": 2}
    changes: dict[str, dict] = {}
    for row in TABLE if columns[name] else ():
        value = row[columns[name]]
        if value is not SAME:
            phase, _, field_name = row[0].partition(".")
            changes.setdefault(phase, {})[field_name] = value
    phases = {phase: dataclasses.replace(getattr(Config(), phase), **fields) for phase, fields in changes.items()}
    return with_outputs(Config(**phases), outputs or PRESETS[name])


def with_outputs(config: Config, folder: str) -> Config:
    """The same config with every path below ./outputs moved below `folder`, hand-offs between phases included."""
    folder = folder.rstrip("/") or "/"

    def moved(phase):
        paths = {}
        for item in dataclasses.fields(phase):
            value = getattr(phase, item.name)
            if isinstance(value, str) and value.startswith("./outputs/"):
                paths[item.name] = folder + value[len("./outputs") :]
        return dataclasses.replace(phase, **paths)

    return dataclasses.replace(
        config, **{item.name: moved(getattr(config, item.name)) for item in dataclasses.fields(config)}
    )
