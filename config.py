"""Every number of the pipeline: one frozen dataclass per phase, three presets, and the command line made from them.

Edit a default here, or override any field when running a script:

    python train_vae.py --preset cpu --data.root ./data --vae.lr 1e-4

Importing this file is cheap: it loads no torch.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal


class UsageError(Exception):
    """Something the user can put right; the message says how. Scripts print it on one line and exit with 2."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _require_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    upper = "" if high == math.inf else f" and at most {high:g}"
    _require(math.isfinite(value) and low <= value <= high, f"{name} must be at least {low:g}{upper}, got {value}")


@dataclass(frozen=True)
class DataConfig:
    """Where the radiographs are and how a file becomes x in [-1, 1]."""

    root: str = "./data"  # normal radiographs: a folder (searched recursively) or a manifest.csv (image, and where known split, label, kind, mask, patient)
    test: str = ""  # what phase 4 examines: a folder or a manifest.csv; empty takes the test split of root
    height: int = 256  # model input in pixels; a multiple of 8 x 2^(UNet levels - 1)
    width: int = 256  # rectangles work: 256 x 512 is the natural shape of a panoramic
    fit: Literal["stretch", "pad"] = (
        "stretch"  # stretch squashes to height x width; pad keeps the aspect ratio and fills with black
    )
    percentile_low: float = 0.1  # intensities at or below this percentile become -1
    percentile_high: float = 99.9  # intensities at or above this percentile become +1; 99.5 if metal darkens the rest
    val_share: float = 0.15  # share of patients held out for validation where no split is given
    test_share: float = 0.15  # share of normal patients held out for testing where a manifest has labels but no split
    max_bad_share: float = (
        0.05  # a run stops if more than this share of the files cannot be read; fewer go to skipped_files.csv
    )
    cache_gb: float = 4.0  # decoded images kept in memory up to this size; 0 reads every file anew each epoch
    num_workers: int = 4  # loader processes; 0 loads in the main process
    flip: bool = (
        False  # mirror left-right at random; doubles the data, but left and right then mean nothing to the model
    )
    rotate_degrees: float = 3.0  # augmentation: random rotation up to this angle; 0 switches it off
    shift_share: float = 0.02  # augmentation: random shift up to this share of the image size
    scale_share: float = 0.05  # augmentation: random zoom in [1 - s, 1 + s]
    brightness: float = 0.05  # augmentation: random offset up to this much, in units of [-1, 1]
    contrast: float = 0.10  # augmentation: random gain in [1 - c, 1 + c] about mid-grey
    gamma: float = 0.10  # augmentation: random exponent in [1 - g, 1 + g] on intensities in [0, 1]
    noise_std: float = 0.01  # augmentation: Gaussian noise up to this standard deviation, in units of [-1, 1]

    def __post_init__(self):
        _require(
            self.height > 0 and self.width > 0,
            f"data.height and data.width must be positive, got {self.height} x {self.width}",
        )
        ordered = 0 <= self.percentile_low < self.percentile_high <= 100
        _require(ordered, "data.percentile_low must lie below data.percentile_high, both in [0, 100]")
        for name in ("val_share", "test_share"):
            _require_range(f"data.{name}", getattr(self, name), 0, 0.9)
        _require_range("data.max_bad_share", self.max_bad_share, 0, 1)
        for name in ("cache_gb", "num_workers", "rotate_degrees", "brightness", "noise_std"):
            _require_range(f"data.{name}", getattr(self, name), 0)
        for name in ("shift_share", "scale_share", "contrast", "gamma"):
            _require_range(f"data.{name}", getattr(self, name), 0, 0.9)


@dataclass(frozen=True)
class VAEConfig:
    """Phase 1, train_vae.py: fine-tune a pretrained VAE on normal radiographs."""

    pretrained: str = "stabilityai/sd-vae-ft-mse"  # a hub name, a local diffusers folder (AutoencoderKL or AutoencoderTiny), or "scratch"
    freeze_encoder: bool = True  # train the decoder only: the latent space stays the pretrained one; False trains both
    lambda_pix: float = 1.0  # weight of the L1 pixel error; more: closer grey levels
    lambda_grad: float = 0.5  # weight of the gradient error; more: sharper edges
    lambda_hf: float = 0.3  # weight of the Laplacian error; more: finer texture, at last also noise
    lambda_ssim: float = 0.1  # weight of 1 - SSIM; more: better local contrast
    beta_kl: float = 1e-6  # weight of the KL to a unit Gaussian; means nothing while the encoder is frozen
    lr: float = 5e-5  # AdamW learning rate after warm-up; halve it if the validation loss jumps
    lr_warmup_steps: int = 200  # linear warm-up, then cosine to a tenth of lr
    weight_decay: float = 0.01  # AdamW weight decay
    batch_size: int = 8  # images per step and process; lower it on CUDA out of memory
    steps: int = 20_000  # optimizer steps in all
    grad_clip: float = 1.0  # largest gradient norm
    validate_every: int = 500  # steps between validations; each writes a PNG grid
    log_every: int = 50  # steps between log lines
    scratch_channels: tuple[int, ...] = (
        32,
        64,
        64,
        64,
    )  # "scratch" only: channels per level; each level but the last halves the image
    scratch_latent_channels: int = 4  # "scratch" only: channels of the latent
    output: str = "./outputs/phase1_vae"  # checkpoints, log.csv, validation grids

    def __post_init__(self):
        for name in (
            "lambda_pix",
            "lambda_grad",
            "lambda_hf",
            "lambda_ssim",
            "beta_kl",
            "weight_decay",
            "lr_warmup_steps",
        ):
            _require_range(f"vae.{name}", getattr(self, name), 0)
        _require(
            self.lambda_pix + self.lambda_grad + self.lambda_hf + self.lambda_ssim > 0,
            "vae: at least one reconstruction weight must be above 0",
        )
        for name in ("lr", "grad_clip"):
            _require(getattr(self, name) > 0, f"vae.{name} must be above 0, got {getattr(self, name)}")
        for name in ("batch_size", "steps", "validate_every", "log_every", "scratch_latent_channels"):
            _require_range(f"vae.{name}", getattr(self, name), 1)
        _require(
            self.pretrained != "", 'vae.pretrained is empty: give a hub name, a local diffusers folder, or "scratch"'
        )


@dataclass(frozen=True)
class LatentConfig:
    """Phase 2, extract_latents.py: z = posterior mean of every normal radiograph."""

    vae_checkpoint: str = "./outputs/phase1_vae/checkpoint_best.pt"  # the VAE of phase 1
    batch_size: int = 16  # images encoded at once
    augmented_copies: int = (
        4  # augmented latents per training image beside the plain one; useful below some thousand images
    )
    outlier_std: float = (
        8.0  # a latent whose mean or spread lies this many robust deviations out is named as a likely bad file
    )
    output: str = "./outputs/phase2_latents"  # latents_{train,val}.npy and .pkl, latents.json

    def __post_init__(self):
        _require_range("latent.batch_size", self.batch_size, 1)
        _require_range("latent.augmented_copies", self.augmented_copies, 0)
        _require(self.outlier_std > 0, f"latent.outlier_std must be above 0, got {self.outlier_std}")


@dataclass(frozen=True)
class UNetConfig:
    """The dual-head UNet of phase 3."""

    channels: tuple[int, ...] = (128, 256, 512)  # features per level; each level but the last halves the latent
    layers_per_block: int = 2  # residual blocks per level
    attention: tuple[bool, ...] = (False, True, True)  # self-attention per level; costly on the first
    norm_groups: int = 32  # groups of the group norm; divides every entry of channels
    attention_head_dim: int = 32  # features per attention head; divides the channels of every level with attention
    dropout: float = 0.0  # dropout in the residual blocks; 0.1 helps on a few hundred images

    def __post_init__(self):
        _require(len(self.channels) >= 1, "unet.channels must name at least one level")
        _require(
            len(self.channels) == len(self.attention),
            f"unet.attention needs one entry per level: {len(self.channels)}, got {len(self.attention)}",
        )
        for channels, attends in zip(self.channels, self.attention, strict=True):
            _require(
                channels > 0 and channels % self.norm_groups == 0,
                f"unet.channels must be multiples of unet.norm_groups = {self.norm_groups}, got {channels}",
            )
            _require(
                not attends or channels % self.attention_head_dim == 0,
                f"unet.attention_head_dim = {self.attention_head_dim} must divide {channels}",
            )
        _require_range("unet.layers_per_block", self.layers_per_block, 1)
        _require_range("unet.dropout", self.dropout, 0, 0.9)

    @property
    def downsampling(self) -> int:
        """Factor by which the UNet shrinks the latent: its height and width must be multiples of this."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class FlowDiffTrainingConfig:
    """Phase 3, train_flowdiff.py: noise prediction, velocity, then the identity constraint."""

    lambda_diff: float = 1.0  # weight of the noise prediction (diffusion head)
    lambda_flow: float = 0.5  # weight of the velocity (flow head)
    lambda_id_global: float = 0.1  # weight of |x - G(x)| once warmed up; more: normals change less, but so do lesions
    identity_noise_level: float = 0.4  # how far out G walks in the identity loss; keep it at inference.noise_level
    identity_space: Literal["pixel", "latent"] = (
        "pixel"  # pixel decodes through the frozen decoder (the real thing); latent is some ten times cheaper
    )
    identity_share: float = 0.25  # share of each batch that the identity loss sees; at least one image
    identity_solver: Literal["one_step", "euler", "heun", "ddim"] = "one_step"  # how G walks back in the identity loss
    identity_steps: int = 1  # steps of that walk; the memory of training grows with it
    phase1_steps: int = 100_000  # the generative stage ends here; its EMA weights are kept as checkpoint_generative.pt
    total_steps: int = 300_000  # optimizer steps in all
    identity_warmup_start: int = 90_000  # lambda_id is 0 up to here
    identity_warmup_end: int = 110_000  # and lambda_id_global from here on; linear between
    batch_size: int = 64  # latents per step and process; lower it on CUDA out of memory
    lr: float = 1e-4  # AdamW learning rate after warm-up
    lr_warmup_steps: int = 1_000  # linear warm-up, then cosine to a tenth of lr
    weight_decay: float = 0.01  # AdamW weight decay
    grad_clip: float = 1.0  # largest gradient norm
    ema_decay: float = 0.9999  # EMA of the weights; about 1 / (1 - decay) steps are averaged
    validate_every: int = 2_000  # steps between validations
    sample_every: int = 10_000  # steps between PNGs of samples and of G(x) on validation normals
    log_every: int = 100  # steps between log lines
    latents: str = "./outputs/phase2_latents"  # the folder phase 2 wrote
    vae_checkpoint: str = "./outputs/phase1_vae/checkpoint_best.pt"  # the VAE of phase 1, to decode
    output: str = "./outputs/phase3_flowdiff"  # checkpoints, log.csv, samples

    def __post_init__(self):
        for name in ("lambda_diff", "lambda_flow", "lambda_id_global", "weight_decay", "lr_warmup_steps"):
            _require_range(f"flowdiff.{name}", getattr(self, name), 0)
        _require(self.lambda_diff > 0 or self.lambda_flow > 0, "flowdiff: lambda_diff or lambda_flow must be above 0")
        _require(
            0 < self.identity_noise_level < 1,
            f"flowdiff.identity_noise_level must lie in (0, 1), got {self.identity_noise_level}",
        )
        _require(0 < self.identity_share <= 1, f"flowdiff.identity_share must lie in (0, 1], got {self.identity_share}")
        for name in ("lr", "grad_clip"):
            _require(getattr(self, name) > 0, f"flowdiff.{name} must be above 0, got {getattr(self, name)}")
        for name in ("total_steps", "batch_size", "validate_every", "sample_every", "log_every", "identity_steps"):
            _require_range(f"flowdiff.{name}", getattr(self, name), 1)
        _require(0 <= self.ema_decay < 1, f"flowdiff.ema_decay must lie in [0, 1), got {self.ema_decay}")
        ordered = 0 <= self.identity_warmup_start <= self.identity_warmup_end
        _require(ordered, "flowdiff.identity_warmup_start must not lie after identity_warmup_end")
        _require(1 <= self.phase1_steps <= self.total_steps, "flowdiff.phase1_steps must lie between 1 and total_steps")


@dataclass(frozen=True)
class InferenceConfig:
    """Phase 4, inference.py: G(x), the anomaly map, the score."""

    method: Literal["plain", "calibrated"] = (
        "plain"  # plain is the formula below; calibrated fuses many views as validation normals teach
    )
    noise_level: float = 0.4  # how far G walks out; 0 changes nothing, 1 forgets the image. Useful: 0.2 to 0.5
    solver: Literal["one_step", "euler", "heun", "ddim"] = (
        "euler"  # how G walks back; ddim uses the diffusion head, the others the flow head
    )
    steps: int = 8  # steps of that walk; one_step takes one
    draws: int = 1  # noise draws whose G(x) are averaged; more: less random, slower
    levels: tuple[float, ...] = (
        0.1,
        0.2,
        0.3,
    )  # calibrated: noise levels of the views; low ones keep detail, high ones remove more
    implants: int = 160  # calibrated: corrupted validation normals the fusion of the views is fitted to
    alpha_l1: float = 1.0  # weight of |x - G(x)| in the anomaly map
    beta_grad: float = 0.5  # weight of the gradient residual
    gamma_hf: float = 0.3  # weight of the Laplacian residual
    smooth_sigma: float = (
        0.0  # Gaussian blur of the anomaly map in pixels; 0 leaves the formula exact, 2 to 4 suppresses speckle
    )
    top_share: float = (
        0.01  # the image score is the mean of this share of highest map values: about the area of a lesion
    )
    target_fpr: float = (
        0.05  # share of validation normals above the image threshold, and of their pixels above the map threshold
    )
    batch_size: int = 8  # images at once
    figures: int = -1  # result_XXX.png for this many images, spread evenly over the kinds; -1 draws all, 0 none
    save_maps: bool = True  # anomaly maps as .npy at the size of the original image
    vae_checkpoint: str = "./outputs/phase1_vae/checkpoint_best.pt"  # the VAE of phase 1
    flow_checkpoint: str = "./outputs/phase3_flowdiff/checkpoint_best.pt"  # the normalizer of phase 3
    output: str = "./outputs/phase4_inference"  # figures, scores.csv, maps, metrics.json

    def __post_init__(self):
        _require(0 < self.noise_level < 1, f"inference.noise_level must lie in (0, 1), got {self.noise_level}")
        for name in ("alpha_l1", "beta_grad", "gamma_hf", "smooth_sigma"):
            _require_range(f"inference.{name}", getattr(self, name), 0)
        _require(
            self.alpha_l1 + self.beta_grad + self.gamma_hf > 0,
            "inference: one of alpha_l1, beta_grad, gamma_hf must be above 0",
        )
        for name in ("steps", "draws", "batch_size"):
            _require_range(f"inference.{name}", getattr(self, name), 1)
        _require(0 < self.top_share <= 1, f"inference.top_share must lie in (0, 1], got {self.top_share}")
        _require(0 < self.target_fpr < 1, f"inference.target_fpr must lie in (0, 1), got {self.target_fpr}")
        _require_range("inference.figures", self.figures, -1)
        inside = len(self.levels) > 0 and all(0 < level < 1 for level in self.levels)
        _require(inside, f"inference.levels needs noise levels in (0, 1), got {self.levels}")
        _require_range("inference.implants", self.implants, 1)


@dataclass(frozen=True)
class RuntimeConfig:
    """Device, precision, seed and tracking, the same in every phase."""

    seed: int = 0  # fixes every random draw: split, augmentation, weights, noise
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU where there is one
    precision: Literal["auto", "no", "bf16"] = (
        "auto"  # training only: auto takes bf16 where the hardware multiplies it; inference is float32
    )
    resume: bool = True  # continue from checkpoint_last.pt where one exists; --runtime.resume False starts anew
    wandb: Literal["disabled", "offline", "online"] = (
        "disabled"  # numbers only, never an image; online needs WANDB_API_KEY
    )
    wandb_project: str = "dental-normalizer"  # project the runs appear under
    checkpoint_every: int = 1_000  # steps between writes of checkpoint_last.pt in phases 1 and 3

    def __post_init__(self):
        _require_range("runtime.seed", self.seed, 0, 2**31 - 1)
        _require_range("runtime.checkpoint_every", self.checkpoint_every, 1)


@dataclass(frozen=True)
class Config:
    """All of it; every script takes the whole and reads its part."""

    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    flowdiff: FlowDiffTrainingConfig = field(default_factory=FlowDiffTrainingConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self):
        divisor = VAE_DOWNSAMPLING * self.unet.downsampling
        for name in ("height", "width"):
            size = getattr(self.data, name)
            below, above = size // divisor * divisor, -(-size // divisor) * divisor
            nearest = " or ".join(str(s) for s in (below, above) if s > 0)
            _require(
                size % divisor == 0,
                f"data.{name} = {size} does not divide by {divisor} (VAE {VAE_DOWNSAMPLING} x UNet {self.unet.downsampling}): use {nearest}",
            )


VAE_DOWNSAMPLING = 8  # Stable Diffusion's VAEs turn 8 x 8 pixels into one latent entry


def with_outputs(config: Config, folder: str) -> Config:
    """The same config with every path below ./outputs moved below `folder`, hand-offs between phases included."""
    folder = folder.rstrip("/") or "/"

    def moved(phase):
        paths = {f.name: getattr(phase, f.name) for f in dataclasses.fields(phase)}
        paths = {
            name: folder + path[len("./outputs") :]
            for name, path in paths.items()
            if isinstance(path, str) and path.startswith("./outputs/")
        }
        return dataclasses.replace(phase, **paths)

    return dataclasses.replace(config, **{f.name: moved(getattr(config, f.name)) for f in dataclasses.fields(config)})


def _cpu() -> Config:
    """Two cores, under an hour for some hundred radiographs: a tiny pretrained autoencoder and a small UNet."""
    return Config(
            data=DataConfig(num_workers=0),
            vae=VAEConfig(pretrained="madebyollin/taesd", lr=3e-4, lr_warmup_steps=30, batch_size=4, steps=450, validate_every=75, log_every=25),
            latent=LatentConfig(augmented_copies=4),
            unet=UNetConfig(channels=(64, 128, 192), layers_per_block=1, attention=(False, False, True), norm_groups=16),
            flowdiff=FlowDiffTrainingConfig(
                identity_space="latent", phase1_steps=1_200, total_steps=1_600, identity_warmup_start=1_200, identity_warmup_end=1_350,
                batch_size=16, lr=4e-4, lr_warmup_steps=100, ema_decay=0.998, validate_every=200, sample_every=800, log_every=50,
            ),
            runtime=RuntimeConfig(device="cpu", checkpoint_every=150),
    )  # fmt: skip


def _demo() -> Config:
    """Phantoms and the VAE in assets/: all four phases in minutes on two cores."""
    return Config(
            data=DataConfig(
                root="./outputs/phantoms", height=128, width=256, percentile_low=0.5, percentile_high=99.5, num_workers=0, rotate_degrees=1.5, flip=True
            ),
            vae=VAEConfig(pretrained="./assets/phantom_vae", lr=2e-4, lr_warmup_steps=10, batch_size=4, steps=100, validate_every=50, log_every=10),
            latent=LatentConfig(augmented_copies=8),
            unet=UNetConfig(channels=(64, 128, 128), layers_per_block=1, attention=(False, False, True), norm_groups=16),
            flowdiff=FlowDiffTrainingConfig(
                identity_space="latent", phase1_steps=900, total_steps=1_200, identity_warmup_start=800, identity_warmup_end=1_000,
                batch_size=16, lr=5e-4, lr_warmup_steps=50, ema_decay=0.995, validate_every=200, sample_every=600, log_every=50,
            ),
            inference=InferenceConfig(method="calibrated", solver="one_step", draws=2, top_share=0.002, figures=24),
            runtime=RuntimeConfig(device="cpu", checkpoint_every=400),
    )  # fmt: skip


PRESETS = {"default": (Config, "./outputs"), "cpu": (_cpu, "./outputs/cpu"), "demo": (_demo, "./outputs/demo")}


def preset(name: str, outputs: str | None = None) -> Config:
    """A preset by name, its paths below `outputs` or below a folder of its own; UsageError for an unknown name."""
    _require(name in PRESETS, f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    build, folder = PRESETS[name]
    return with_outputs(build(), outputs or folder)


def rebuild_phase(phase: type, stored: dict):
    """A phase's config from the plain dict a checkpoint holds: lists become the tuples they were."""
    return phase(**{key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()})
