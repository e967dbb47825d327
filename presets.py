"""Leaf: the presets, as a table of what differs from the defaults of config.py, and --outputs, which moves paths."""

import dataclasses

from checks import UsageError
from config import Config

SAME = object()  # as in the default
# cpu: two cores, 40 minutes to four hours for some hundred radiographs. gpu: a GPU, a quarter of an hour
# for as many, at 512 px. demo: phantoms, minutes on two cores.
# fmt: off
TABLE = (
    # field                           cpu                    gpu                    demo
    ("data.root",                     SAME,                  SAME,                  "./outputs/phantoms"),
    ("data.height",                   SAME,                  512,                   128),
    ("data.width",                    SAME,                  512,                   SAME),
    ("data.percentile_low",           SAME,                  SAME,                  0.5),
    ("data.percentile_high",          SAME,                  SAME,                  99.5),
    ("data.num_workers",              2,                     SAME,                  0),
    ("data.flip",                     SAME,                  SAME,                  True),
    ("data.rotate_degrees",           SAME,                  SAME,                  1.5),
    ("vae.pretrained",                "madebyollin/taesd",   "madebyollin/taesd",   "./assets/phantom_vae"),
    ("vae.lr",                        3e-4,                  3e-4,                  2e-4),
    ("vae.lr_warmup_steps",           30,                    30,                    10),
    ("vae.batch_size",                4,                     4,                     4),
    ("vae.steps",                     900,                   900,                   60),
    ("vae.crop",                      128,                   128,                   SAME),  # 0: 4.5 times at 256 px
    ("vae.validate_every",            150,                   150,                   30),
    ("vae.log_every",                 25,                    25,                    10),
    ("latent.augmented_copies",       SAME,                  SAME,                  2),
    ("unet.channels",                 (64, 128, 192),        (64, 128, 192),        (64, 128, 128)),
    ("unet.layers_per_block",         1,                     1,                     1),
    ("unet.attention",                (False, False, True),  (False, False, True),  (False, False, True)),
    ("unet.norm_groups",              16,                    16,                    16),
    ("flowdiff.identity_space",       "latent",              "latent",              "latent"),
    ("flowdiff.phase1_steps",         1_200,                 2_400,                 300),
    ("flowdiff.total_steps",          1_600,                 3_200,                 400),
    ("flowdiff.identity_warmup_start",1_200,                 2_400,                 260),
    ("flowdiff.identity_warmup_end",  1_350,                 2_700,                 300),
    ("flowdiff.batch_size",           16,                    16,                    16),
    ("flowdiff.lr",                   4e-4,                  4e-4,                  5e-4),
    ("flowdiff.lr_warmup_steps",      100,                   100,                   50),
    ("flowdiff.ema_decay",            0.998,                 0.998,                 0.995),
    ("flowdiff.validate_every",       200,                   400,                   100),
    ("flowdiff.sample_every",         800,                   1_600,                 400),
    ("flowdiff.log_every",            50,                    50,                    50),
    ("inference.precision",           "auto",                "auto",                SAME),
    ("inference.solver",              SAME,                  SAME,                  "one_step"),
    ("inference.draws",               SAME,                  SAME,                  2),
    ("inference.top_share",           SAME,                  SAME,                  0.002),
    ("inference.figures",             SAME,                  SAME,                  14),
    ("calibration.blurs",             SAME,                  SAME,                  (0.008, 0.016, 0.032)),
    ("calibration.alignment",         SAME,                  SAME,                  0.024),
    ("reader.magnification",          SAME,                  1,                     SAME),  # G sees it all
    ("reader.copies",                 1,                     SAME,                  2),
    ("reader.mirror",                 SAME,                  SAME,                  False),  # sides are drawn apart
    ("reader.members",                1,                     1,                     1),
    ("reader.steps",                  1_000,                 3_000,                 2_700),
    ("reader.tuned_steps",            1_200,                 4_000,                 0),
    ("reader.fewest_corruptions",     SAME,                  SAME,                  4),
    ("reader.most_corruptions",       SAME,                  SAME,                  10),
    ("reader.residual_weight",        SAME,                  SAME,                  1.0),  # seeds 8 and 9 say so
    ("runtime.device",                "cpu",                 "cuda",                "cpu"),
    ("runtime.checkpoint_every",      150,                   150,                   100),
)
# fmt: on
COLUMNS = ("cpu", "gpu", "demo")
PRESETS = {"default": "./outputs"} | {name: f"./outputs/{name}" for name in COLUMNS}  # name -> where its files go


def preset(name: str, outputs: str | None = None) -> Config:
    """A preset by name, its paths below `outputs` or below a folder of its own; UsageError for an unknown name."""
    if outputs == "":
        raise UsageError("--outputs is empty: give a folder")
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    changes: dict[str, dict] = {}
    for field, *values in TABLE if name in COLUMNS else ():
        value = values[COLUMNS.index(name)]
        if value is not SAME:
            phase, _, field_name = field.partition(".")
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
