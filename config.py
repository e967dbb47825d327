"""Every number of the pipeline: one frozen dataclass per phase. presets.py has what the presets change, and
config_reading.py the numbers of how phase 4 reads what G changed.

Edit a default here, or override any field when running a script:

    python train_vae.py --preset cpu --data.root ./data --vae.lr 1e-4

Importing this file is cheap: it loads no torch. Lengths in an image are shares of its height, so that they mean the
same at every resolution: 0.004 is one pixel at 256.
"""

from dataclasses import dataclass, field
from typing import Literal

from checks import require, require_between, require_part, require_positive, require_ranges
from config_reading import CalibrationConfig, ReaderConfig

LARGEST_SIDE = 8192  # pixels of the model's input; beyond any detector and any memory
VERSION = "0.1.0"  # of this code, as pyproject.toml has it
MAKER = "dental-normalizer"  # how DICOM objects of ours say who made them, and are known again
VAE_DOWNSAMPLING = 8  # Stable Diffusion's VAEs turn 8 x 8 pixels into one latent entry
PREPROCESSING = ("height", "width", "fit", "percentile_low", "percentile_high")  # of DataConfig: how a file becomes x
# of DataConfig: shapes no image
WHEREABOUTS = ("root", "test", "num_workers", "cache_gb", "cache_disk_gb", "cache_folder", "max_bad_share")
SPLIT = ("patient_from", "val_share", "test_share", "split_seed")  # of DataConfig: who trains, validates and tests
Solver = Literal[
    "one_step", "euler", "heun", "ddim"
]  # how G walks back: ddim by the diffusion head, the others by the flow head


@dataclass(frozen=True)
class DataConfig:
    """Where the radiographs are and how a file becomes x in [-1, 1]."""

    # normal radiographs: a folder (searched recursively) or a manifest.csv: image, split, label, kind, mask, patient
    root: str = "./data"
    test: str = ""  # what phase 4 examines: a folder or a manifest.csv; empty takes the test split of root
    height: int = 256  # model input in pixels; a multiple of 8 x 2^(UNet levels - 1)
    width: int = 256  # rectangles work: 256 x 512 is the natural shape of a panoramic
    fit: Literal["stretch", "pad"] = "stretch"  # stretch squashes; pad keeps the aspect ratio and fills with black
    percentile_low: float = 0.1  # intensities at or below this percentile become -1
    percentile_high: float = 99.9  # intensities at or above this percentile become +1; 99.5 if metal darkens the rest
    # whose a file is where no DICOM header or manifest says: its folder's, or its own; auto looks at the folders
    patient_from: Literal["auto", "folder", "file"] = "auto"
    val_share: float = 0.15  # share of patients held out for validation where no split is given
    test_share: float = 0.15  # share of normal patients held out for testing where a manifest has labels but no split
    split_seed: int = 0  # another number, another split; runtime.seed leaves the split alone
    max_bad_share: float = 0.05  # a run stops if more files cannot be read; fewer are listed in skipped_local_only.csv
    cache_gb: float = 4.0  # decoded images kept in memory up to this size; more are read from the disk in each epoch
    # decoded images kept on disk up to this size, float32: 1 MB each at 512 x 512, 4.2 MB for the reader at twice that;
    # read from there by later epochs, phases and runs; 0 decodes files each time they are read
    cache_disk_gb: float = 50.0
    cache_folder: str = "./outputs/cache"  # --preset, --outputs move it; pixels, so its owner's alone; may be removed
    # processes that read ahead; in phase 4 threads that do, processes that draw, and while the reader learns processes
    # that corrupt radiographs; 0 does it all in the main process
    num_workers: int = 4
    # where images are augmented: on the host one by one, or on the device in batches, by the same random numbers and
    # the same but for interpolation (augmentation.py); auto: on the device if it is a GPU
    augment_on: Literal["auto", "host", "device"] = "auto"
    flip: bool = False  # mirror left-right at random: doubles the data, but left and right then mean nothing
    rotate_degrees: float = 3.0  # augmentation: random rotation up to this angle; 0 switches it off
    shift_share: float = 0.02  # augmentation: random shift up to this share of the image size
    scale_share: float = 0.05  # augmentation: random zoom in [1 - s, 1 + s]
    brightness: float = 0.05  # augmentation: random offset up to this much, in units of [-1, 1]
    contrast: float = 0.10  # augmentation: random gain in [1 - c, 1 + c] about mid-grey
    gamma: float = 0.10  # augmentation: random exponent in [1 - g, 1 + g] on intensities in [0, 1]
    noise_std: float = 0.01  # augmentation: Gaussian noise up to this standard deviation, in units of [-1, 1]

    def __post_init__(self):
        require(self.root != "", "data.root is empty: give a folder of radiographs or a manifest.csv")
        require_ranges("data", self, ("height", "width"), 1, LARGEST_SIDE)
        ordered = 0 <= self.percentile_low < self.percentile_high <= 100
        require(ordered, "data.percentile_low must lie below data.percentile_high, both in [0, 100]")
        require_ranges("data", self, ("val_share", "test_share"), 0, 0.9)
        require_ranges("data", self, ("max_bad_share",), 0, 1)
        require_ranges("data", self, ("split_seed",), 0, 2**31 - 1)
        require_ranges("data", self, ("cache_gb", "cache_disk_gb", "num_workers"), 0, 1e7)
        require(self.cache_folder != "", "data.cache_folder is empty: give a folder, or set data.cache_disk_gb 0")
        require_ranges("data", self, ("rotate_degrees",), 0, 180)
        require_ranges("data", self, ("brightness", "noise_std"), 0, 2)
        require_ranges("data", self, ("shift_share", "scale_share", "contrast", "gamma"), 0, 0.9)

    @property
    def preprocessing(self) -> dict:
        """How a file becomes x, as an artefact hands it on."""
        return {name: getattr(self, name) for name in PREPROCESSING}

    @property
    def split(self) -> dict:
        """The rule that says who trains, validates and tests, as an artefact hands it on."""
        return {name: getattr(self, name) for name in SPLIT}


@dataclass(frozen=True)
class VAEConfig:
    """Phase 1, train_vae.py: fine-tune a pretrained VAE on normal radiographs."""

    # a hub name, a local diffusers folder (AutoencoderKL or AutoencoderTiny), or "scratch"
    pretrained: str = "stabilityai/sd-vae-ft-mse"
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
    # train on random squares of this many pixels, a multiple of 8, instead of whole images: cheaper steps, and the
    # decoder knows the whole from validation alone; a shorter side stays whole, and 0 takes whole images
    crop: int = 0
    steps: int = 20_000  # optimizer steps in all
    patience: int = 0  # end after so many validations in a row without a lower loss; 0 takes all steps
    grad_clip: float = 1.0  # largest gradient norm
    validate_every: int = 500  # steps between validations; each writes a PNG grid
    log_every: int = 50  # steps between log lines
    scratch_channels: tuple[int, ...] = (32, 64, 64, 64)  # "scratch" only: levels; each but the last halves the image
    scratch_latent_channels: int = 4  # "scratch" only: channels of the latent
    output: str = "./outputs/phase1_vae"  # checkpoints, log.csv, validation grids

    def __post_init__(self):
        weights = ("lambda_pix", "lambda_grad", "lambda_hf", "lambda_ssim")
        require_ranges("vae", self, (*weights, "beta_kl", "weight_decay", "lr_warmup_steps"), 0)
        some = any(getattr(self, name) > 0 for name in weights)
        require(some, "vae: at least one reconstruction weight must be above 0")
        require_positive("vae", self, ("lr", "grad_clip"))
        counts = ("batch_size", "steps", "validate_every", "log_every", "scratch_latent_channels")
        require_ranges("vae", self, counts, 1)
        require_ranges("vae", self, ("patience",), 0)
        require_ranges("vae", self, ("crop",), 0, LARGEST_SIDE)
        whole = self.crop % VAE_DOWNSAMPLING == 0
        require(whole, f"vae.crop must be a multiple of {VAE_DOWNSAMPLING}, or 0 for whole images, got {self.crop}")
        widths = len(self.scratch_channels) > 0 and min(self.scratch_channels) > 0
        require(widths, f"vae.scratch_channels needs one or more numbers above 0, got {self.scratch_channels}")
        require(
            self.pretrained != "", 'vae.pretrained is empty: give a hub name, a local diffusers folder, or "scratch"'
        )


@dataclass(frozen=True)
class LatentConfig:
    """Phase 2, extract_latents.py: z = posterior mean of every normal radiograph."""

    vae_checkpoint: str = "./outputs/phase1_vae/checkpoint_best.pt"  # the VAE of phase 1
    batch_size: int = 16  # images encoded at once
    augmented_copies: int = 4  # augmented latents per training image beside the plain one; for below some 1,000 images
    outlier_std: float = 8.0  # a latent this many robust deviations out is named as a likely bad file, in phase 4 too
    output: str = "./outputs/phase2_latents"  # latents_{train,val}.npy and .pkl, latents.json

    def __post_init__(self):
        require_ranges("latent", self, ("batch_size",), 1)
        require_ranges("latent", self, ("augmented_copies",), 0, 1000)
        require_positive("latent", self, ("outlier_std",))


@dataclass(frozen=True)
class UNetConfig:
    """The dual-head UNet of phase 3."""

    channels: tuple[int, ...] = (128, 256, 512)  # features per level; each level but the last halves the latent
    layers_per_block: int = 2  # residual blocks per level
    attention: tuple[bool, ...] = (False, True, True)  # self-attention per level; costly on the first
    norm_groups: int = 32  # groups of the group norm; divides every entry of channels
    attention_head_dim: int = 32  # features per attention head; divides the channels of every level with attention
    dropout: float = 0.0  # dropout in the residual blocks; 0.1 helps on a few hundred images
    # side, in latent entries, of the tiles that it trains on and that larger latents are read by, each with its
    # position: 32 trains at 512 px for the price of 256, and reads in nine overlapping tiles; 0 sees the whole
    tile: int = 0

    def __post_init__(self):
        levels = len(self.channels)
        require(levels >= 1, "unet.channels must name at least one level")
        entries = len(self.attention)
        require(levels == entries, f"unet.attention needs {levels} entries, one per level, got {entries}")
        require_ranges("unet", self, ("layers_per_block", "norm_groups", "attention_head_dim"), 1)
        attention = (*self.attention[:-1], True)  # the middle, at the width of the last level, always attends
        for channels, attends in zip(self.channels, attention, strict=True):
            divides = channels > 0 and channels % self.norm_groups == 0
            message = f"unet.channels must be multiples of unet.norm_groups = {self.norm_groups}, got {channels}"
            require(divides, message)
            divides = not attends or channels % self.attention_head_dim == 0
            require(divides, f"unet.attention_head_dim = {self.attention_head_dim} must divide {channels}")
        require_ranges("unet", self, ("tile",), 0)
        whole = self.tile % self.downsampling == 0 and self.tile != self.downsampling
        words = f"0 for whole latents, or two or more times {self.downsampling}"
        require(whole, f"unet.tile must be {words}, got {self.tile}")
        require_ranges("unet", self, ("dropout",), 0, 0.9)

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
    identity_space: Literal["pixel", "latent"] = "pixel"  # pixel decodes (the real thing); latent is cheaper
    identity_share: float = 0.25  # share of each batch that the identity loss sees; at least one image
    identity_solver: Solver = "one_step"  # how G walks back in the identity loss
    identity_steps: int = 1  # steps of that walk; the memory of training grows with it
    phase1_steps: int = 100_000  # the generative stage ends here, kept as checkpoint_generative.pt (EMA weights)
    total_steps: int = 300_000  # optimizer steps in all
    identity_warmup_start: int = 90_000  # lambda_id is 0 up to here
    identity_warmup_end: int = 110_000  # and lambda_id_global from here on; the best checkpoint comes from after it
    batch_size: int = 64  # latents per step and process; lower it on CUDA out of memory
    lr: float = 1e-4  # AdamW learning rate after warm-up
    lr_warmup_steps: int = 1_000  # linear warm-up, then cosine to a tenth of lr
    weight_decay: float = 0.01  # AdamW weight decay
    grad_clip: float = 1.0  # largest gradient norm
    # latents up to this size stay in a GPU's memory, or a CPU reads them itself; else, as with 0, data.num_workers do
    device_gb: float = 8.0
    ema_decay: float = 0.9999  # EMA of the weights; about 1 / (1 - decay) steps are averaged
    validate_every: int = 2_000  # steps between validations
    sample_every: int = 10_000  # steps between PNGs of samples and of G(x) on validation normals
    log_every: int = 100  # steps between log lines
    latents: str = "./outputs/phase2_latents"  # the folder phase 2 wrote
    vae_checkpoint: str = "./outputs/phase1_vae/checkpoint_best.pt"  # the VAE of phase 1, to decode
    output: str = "./outputs/phase3_flowdiff"  # checkpoints, log.csv, samples

    def __post_init__(self):
        weights = ("lambda_diff", "lambda_flow", "lambda_id_global", "weight_decay", "lr_warmup_steps")
        require_ranges("flowdiff", self, (*weights, "device_gb"), 0)
        require(self.lambda_diff > 0 or self.lambda_flow > 0, "flowdiff: lambda_diff or lambda_flow must be above 0")
        require_between("flowdiff", self, ("identity_noise_level",))
        inside = 0 < self.identity_share <= 1
        require(inside, f"flowdiff.identity_share must lie in (0, 1], got {self.identity_share}")
        require_positive("flowdiff", self, ("lr", "grad_clip"))
        counts = ("total_steps", "batch_size", "validate_every", "sample_every", "log_every", "identity_steps")
        require_ranges("flowdiff", self, counts, 1)
        require(0 <= self.ema_decay < 1, f"flowdiff.ema_decay must lie in [0, 1), got {self.ema_decay}")
        inside = 1 <= self.phase1_steps <= self.total_steps
        shown = f"got {self.phase1_steps} and {self.total_steps}"
        require(inside, f"flowdiff.phase1_steps must lie between 1 and total_steps, {shown}")
        ordered = 0 <= self.identity_warmup_start <= self.identity_warmup_end
        require(ordered, "flowdiff.identity_warmup_start must not lie after identity_warmup_end")
        ends = self.lambda_id_global == 0 or self.identity_warmup_end <= self.total_steps
        late = f"flowdiff.identity_warmup_end = {self.identity_warmup_end} lies after total_steps = {self.total_steps}"
        require(ends, f"{late}: move it forward, or set lambda_id_global 0 to train without the constraint")


@dataclass(frozen=True)
class InferenceConfig:
    """Phase 4, inference.py: G(x), the anomaly map, the score."""

    # how a change becomes a map: reader asks a network that learnt on corrupted normals (ReaderConfig), plain is the
    # formula below, statistical fuses many views of what G changed, as normals teach (CalibrationConfig)
    method: Literal["reader", "plain", "statistical"] = "reader"
    noise_level: float = 0.4  # how far G walks out; 0 changes nothing, 1 forgets the image. Useful: 0.2 to 0.5
    solver: Solver = "euler"  # how G walks back
    steps: int = 8  # steps of that walk; one_step takes one
    draws: int = 1  # noise draws whose G(x) are averaged; more: less random, slower
    alpha_l1: float = 1.0  # weight of |x - G(x)| in the anomaly map
    beta_grad: float = 0.5  # weight of the gradient residual
    gamma_hf: float = 0.3  # weight of the Laplacian residual
    smooth_share: float = 0.0  # blur of the map, sigma as a share of the height: 0 leaves it exact, 0.008 calms speckle
    top_share: float = 0.01  # the score is the mean of this share of highest map values: about the area of a lesion
    image_fpr: float = 0.05  # share of validation normals whose score lies above the image threshold
    # share of the pixels of normals above the map's threshold. A map that finds a lesion of area share a perfectly has
    # a Dice of 2 a / (2 a + pixel_fpr): for a caries (a = 0.0007) 0.58 at 0.001, and 0.03 at 0.05
    pixel_fpr: float = 0.001
    examine_training_patients: bool = False  # True examines also who trained or validated: their scores flatter
    # of networks that read: bf16 takes half the time on a CPU that multiplies it, and maps differ by rounding, a little
    # from one batch size to another, too; auto is what the machine at hand multiplies: name it where several share
    precision: Literal["float32", "bf16", "auto"] = "float32"
    batch_size: int = 8  # images at once
    figures: int = -1  # result_XXX.png for this many images, spread evenly over the kinds; -1 draws all, 0 none
    report: bool = True  # report.html, all results in one page, with its pictures in report/; about 0.2 MB an image
    save_maps: bool = True  # anomaly maps as .npy at the size of the original image
    # Secondary Capture and Segmentations of every DICOM input, for an archive; they name the patient, as the input does
    dicom: bool = False
    # by independent jobs: calibrate makes what all need, 2/8 examines the second of eight parts, merge joins the parts
    shard: str = ""
    vae_checkpoint: str = "./outputs/phase1_vae/checkpoint_best.pt"  # the VAE of phase 1
    flow_checkpoint: str = "./outputs/phase3_flowdiff/checkpoint_best.pt"  # the normalizer of phase 3
    calibration: str = "./outputs/calibration"  # what normals say: made once per pair of checkpoints, then read
    output: str = "./outputs/phase4_inference"  # figures, scores.csv, maps, metrics.json

    def __post_init__(self):
        require_between("inference", self, ("noise_level", "image_fpr", "pixel_fpr"))
        weights = ("alpha_l1", "beta_grad", "gamma_hf")
        require_ranges("inference", self, weights, 0, 1e6)
        require_ranges("inference", self, ("smooth_share",), 0, 1)
        some = any(getattr(self, name) > 0 for name in weights)
        require(some, "inference: one of alpha_l1, beta_grad, gamma_hf must be above 0")
        require_ranges("inference", self, ("steps", "draws", "batch_size"), 1)
        require(0 < self.top_share <= 1, f"inference.top_share must lie in (0, 1], got {self.top_share}")
        require_ranges("inference", self, ("figures",), -1)
        require_part("inference.shard", self.shard, ("", "calibrate", "merge"))


@dataclass(frozen=True)
class RuntimeConfig:
    """Device, precision, seed and tracking, the same in every phase."""

    seed: int = 0  # fixes every random draw but the split: augmentation, weights, noise
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU where there is one
    precision: Literal["auto", "no", "bf16"] = "auto"  # of training: bf16 where it is fast
    # of phases 1 and 3: True compiles the networks first (minutes, and a C++ compiler), then steps take less time
    compile: bool = False
    resume: bool = True  # continue from checkpoint_last.pt; False removes the earlier run's files and starts anew
    resume_changed: bool = False  # True continues with another number of steps or learning rate than the run began with
    # numbers only, never an image; online needs WANDB_API_KEY
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "dental-normalizer"  # project the runs appear under
    checkpoint_every: int = 1_000  # steps between writes of checkpoint_last.pt in phases 1 and 3
    keep_every: int = 0  # steps between checkpoint_step_XXXXXX.pt, which later phases can read too; 0 keeps none
    keep_most: int = 5  # of these; the oldest go first
    max_skipped_steps: int = 20  # steps in a row whose gradient is not finite before training stops; each is skipped

    def __post_init__(self):
        require_ranges("runtime", self, ("seed",), 0, 2**31 - 1)
        require_ranges("runtime", self, ("checkpoint_every", "max_skipped_steps", "keep_most"), 1)
        require_ranges("runtime", self, ("keep_every",), 0)


@dataclass(frozen=True)
class Config:
    """All of it; every script takes the whole and reads its part."""

    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    flowdiff: FlowDiffTrainingConfig = field(default_factory=FlowDiffTrainingConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self):
        divisor = VAE_DOWNSAMPLING * self.unet.downsampling
        for name in ("height", "width"):
            size = getattr(self.data, name)
            below, above = size // divisor * divisor, -(-size // divisor) * divisor
            nearest = " or ".join(str(multiple) for multiple in (below, above) if multiple > 0)
            parts = f"VAE {VAE_DOWNSAMPLING} x UNet {self.unet.downsampling}"
            require(size % divisor == 0, f"data.{name} = {size} does not divide by {divisor} ({parts}): use {nearest}")


def rebuild_phase(phase: type, stored: dict):
    """A phase's config from the plain dict a checkpoint holds: lists become the tuples they were."""
    return phase(**{key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()})
