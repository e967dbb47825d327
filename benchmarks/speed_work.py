"""What speed.py times: the steps of the four phases as their scripts take them, and what they are compared with.

Networks are untrained and images are noise: neither changes the time. Of the host's work reading files, drawing figures
and writing results are left out; the way to the device is in, and so is augmentation in phase 1. In phase 2, where it
is left out, most images are augmented, too: the part augmentation says what that takes.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from stopwatch import Work, products_in
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly import stacked_views
from augmentation import images_of, on_device
from calibration import Calibration
from computing import adamw, compiled, fast_products, laid_out, leaves_out
from config import VAE_DOWNSAMPLING, Config
from dataset import RadiographDataset, Sample
from features import FeatureExtractor
from files import sha256, write_sealed_json
from flowdiff_batch import draw, latent_batches
from flowdiff_loss import generative_loss, identity_loss, lambda_identity, loss_by_time
from flowdiff_model import FlowDiffUNet
from flowdiff_process import two_heads
from fusion import Fusion, ScoreFusion
from guard import StepGuard
from latent_dataset import FORMAT, LatentDataset, LatentStandard
from model import RadiographVAE, pretrained_vae, vae_loss
from normalizer import Normalizer
from radiographs.manifest import Record
from reader import FeatureStatistics, Reader, ReaderEnsemble
from run_log import Meter
from runtime import EMA, precision_of, reading_precision, step_loader
from standardization import PixelStatistics, features
from survey import magnification_of
from train_flowdiff import training_normalizer
from train_vae import posterior_noise, random_crops
from tuned_backbone import TunedBackbone

FOR_EVER = 10**9  # steps
IMAGES = 16  # that are drawn, and come again and again
PATCHES = 198  # normals whose patches PatchCore remembers, as on ufba_bench
ANODDPM = (128, 128, 256, 384, 512)  # channels of peers/anoddpm.py on a GPU
WALK = 250  # steps of its way back
Change = Callable[[nn.Module], nn.Module]


def computes_in(accelerator: Accelerator) -> str:
    """Whose ceiling a training is held against."""
    tf32 = accelerator.device.type == "cuda" and precision_of(accelerator) == "float32"
    return "tf32" if tf32 else precision_of(accelerator)


def timed(batches: Iterable, waited: list[float]) -> Iterator:
    """The same batches; how long each was waited for is noted."""
    batches = iter(batches)
    while True:
        began = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - began)
        yield batch


# ---------------------------------------------------------------- training


def phase1(config: Config, accelerator: Accelerator, change: Change | None = None, fused: bool | None = None) -> Work:
    """A step of train_vae.py; `change` makes something of the network first, `fused` chooses the optimizer's kernel."""
    settings, device = config.vae, accelerator.device
    fast_products(device)
    vae = (change or (lambda network: laid_out(network, device)))(pretrained_vae(settings))
    trained = [weight for weight in vae.parameters() if weight.requires_grad]
    optimizer = optimizer_of(trained, settings.lr, settings.weight_decay, device, fused)
    model, optimizer = accelerator.prepare(compiled(vae, config.runtime, device), optimizer)
    guard, meter, numbers = StepGuard("vae.lr", 20, optimizer=leaves_out(optimizer)), Meter(), count(1)
    work = Work(None, settings.batch_size, computes_in(accelerator))
    images = images_in_memory(config).augmented(on_device(config.data, device))
    batches = timed(step_loader(images, settings.batch_size, (0, FOR_EVER), config, accelerator), work.waited)
    model.train()

    def step() -> None:
        number, batch = next(numbers), next(batches)
        x = random_crops(images_of(batch, device), config, number, accelerator)
        loss = vae_loss(x, *model(x, posterior_noise(vae, x, config, number, accelerator)), settings)
        accelerator.backward(loss.total)
        grad_norm = accelerator.clip_grad_norm_(trained, settings.grad_clip)
        if guard.passes(number, grad_norm):
            optimizer.step()
            meter.add(guard.counted({"loss": loss.total, **loss.terms, "grad_norm": grad_norm}))
        optimizer.zero_grad(set_to_none=True)
        log(number, settings.log_every, meter, guard)

    work.step = step
    return work


def phase3(
    config: Config,
    accelerator: Accelerator,
    latents: LatentDataset,
    identity: bool = False,
    change: Change | None = None,
    fused: bool | None = None,
) -> Work:
    """A step of train_flowdiff.py, with the identity constraint at full weight or before it begins."""
    settings, device = config.flowdiff, accelerator.device
    fast_products(device)
    network = FlowDiffUNet(config.unet, latents.raw.shape[1]).to(device)
    network = (change or (lambda network: laid_out(network, device)))(network)
    vae = laid_out(frozen(pretrained_vae(config.vae)).to(device), device) if identity else None
    ema = EMA(network, settings.ema_decay)
    optimizer = optimizer_of(network.parameters(), settings.lr, settings.weight_decay, device, fused)
    model, optimizer = accelerator.prepare(compiled(network, config.runtime, device), optimizer)
    guard, meter, numbers = StepGuard("flowdiff.lr", 20, optimizer=leaves_out(optimizer)), Meter(), count(1)
    work = Work(None, settings.batch_size, computes_in(accelerator))
    batches = timed(latent_batches(latents, (0, FOR_EVER), config, accelerator), work.waited)
    lambda_id = lambda_identity(settings.total_steps, settings) if identity else 0.0
    model.train()

    def decode(z: Tensor) -> Tensor:
        with accelerator.autocast():
            return vae.decode(latents.standard.raw(z)).float()

    def step() -> None:
        number = next(numbers)
        batch = draw(next(batches), number, config, accelerator)
        loss = generative_loss(two_heads(model, *batch.places), batch.z, batch.noise, batch.t, settings)
        total, terms = loss.total, loss.terms
        if lambda_id > 0 and len(batch.seen):
            walk = training_normalizer(two_heads(model, *batch.seen_places), batch.walk, config)
            error = identity_loss(walk, batch.seen, decode if settings.identity_space == "pixel" else None)
            total = total + lambda_id * batch.seen_weight * error
            terms = terms | {"loss_id": error, "weighted_id": lambda_id * error}
        accelerator.backward(total)
        grad_norm = accelerator.clip_grad_norm_(network.parameters(), settings.grad_clip)
        if guard.passes(number, grad_norm):
            optimizer.step()
            ema.update(network, guard.counts)
            by_time = loss_by_time(batch.t, loss.diff, "loss_diff") | loss_by_time(batch.t, loss.flow, "loss_flow")
            meter.add(guard.counted({"loss": total, **terms, "grad_norm": grad_norm, **by_time}))
        optimizer.zero_grad(set_to_none=True)
        log(number, settings.log_every, meter, guard)

    work.step = step
    return work


def log(number: int, every: int, meter: Meter, guard: StepGuard) -> None:
    """Fetch what is to be logged, as often as a training does."""
    if number % every == 0:
        _ = meter.flush(), guard.skipped


def optimizer_of(weights: Iterable[Tensor], lr: float, weight_decay: float, device: torch.device, fused: bool | None):
    """The scripts' own, or the one with that kernel."""
    if fused is None:
        return adamw(weights, lr, weight_decay, device)
    return torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay, fused=fused)


def plain_loop(config: Config, accelerator: Accelerator, latents: LatentDataset) -> Work:
    """A step of a plain diffusion training, in the shape of diffusers' example without conditions.

    The same network on the same latents, of which its noise head learns; float32, a schedule of 1,000 steps, batches by
    a loader with its processes, diffusers' own moving average, and the loss of every step fetched for the progress bar.
    """
    settings, device = config.flowdiff, accelerator.device
    network = FlowDiffUNet(config.unet, latents.raw.shape[1]).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    average = EMAModel(network.parameters(), decay=settings.ema_decay, use_ema_warmup=True)
    diffusion = DDPMScheduler(num_train_timesteps=1000)
    work, pinned = Work(None, settings.batch_size), device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        latents,
        settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=config.data.num_workers,
        pin_memory=pinned,
    )
    batches = timed((batch for _ in count() for batch in loader), work.waited)
    network.train()

    def step() -> None:
        z = next(batches).to(device)
        noise = torch.randn_like(z)
        times = torch.randint(1000, (len(z),), device=device)
        predicted, _ = network(diffusion.add_noise(z, noise, times), times / 1000)
        loss = F.mse_loss(predicted, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        loss.detach().item()

    work.step = step
    return work


# ---------------------------------------------------------------- phases 2 and 4


def phase2(config: Config, accelerator: Accelerator) -> Work:
    """A batch of extract_latents.py from images to latents of the host."""
    device, size = accelerator.device, config.latent.batch_size
    vae, x = frozen(pretrained_vae(config.vae)).to(device), noise_images(config, size)

    def step() -> np.ndarray:
        with torch.no_grad(), products_in("float32"):
            return vae.encode(x.to(device))[0].float().cpu().numpy()

    return Work(step, size)


def phase4(config: Config, accelerator: Accelerator) -> Work:
    """A batch of inference.py from images to maps and scores of the host, by inference.method."""
    settings, times = config.inference, magnification_of(config)
    model = untrained_normalizer(config, accelerator.device)
    x = noise_images(config, settings.batch_size, times)
    with torch.no_grad():
        calibration = made_up_calibration(model, config, x[:1])

    def step() -> tuple[np.ndarray, list[float]]:
        with products_in("float32"):
            seen = model.examine(x, times)
            maps = calibration.anomaly_map(seen, config)
            return maps.cpu().numpy(), calibration.scores_of(seen, maps, config).tolist()

    return Work(step, settings.batch_size, reading_precision(settings, accelerator.device))


def untrained_normalizer(config: Config, device: torch.device) -> Normalizer:
    """G with networks that have learnt nothing."""
    vae = frozen(pretrained_vae(config.vae)).to(device)
    network = frozen(FlowDiffUNet(config.unet, vae.latent_channels)).to(device)
    standard = LatentStandard((0.0,) * vae.latent_channels, (1.0,) * vae.latent_channels)
    return Normalizer(vae, network, standard, config.inference, config.runtime.seed)


def made_up_calibration(model: Normalizer, config: Config, x: Tensor) -> Calibration:
    """A calibration of the right shapes for a method, that no normal has taught anything."""
    method, seen = config.inference.method, model.examine(x, magnification_of(config))
    common = {"method": method, "belongs_to": {}, "scores": np.zeros(1), "pixel_threshold": 0.0, "scale": {}}
    common |= {"identity_error": 0.0, "vae_error": 0.0}
    if method == "plain":
        return Calibration(**common)
    if method == "statistical":
        shape = features(stacked_views(seen, config.calibration, config.inference), config.calibration.blurs).shape
        weights = torch.full((2 * shape[1],), 1 / shape[1])
        fusion = Fusion(weights, 0.0, config.calibration.largest_deviation).to(model.device)
        return Calibration(**common, statistics=nothing_unusual(shape, model.device), fusion=fusion)
    extractor = FeatureExtractor(config.reader, model.device)
    maps = extractor(seen)
    ones = [torch.ones(1, part.shape[1], 1, 1, device=model.device) for part in maps]
    statistics = [
        FeatureStatistics(0 * one, one, nothing_unusual(part.shape, model.device))
        for one, part in zip(ones, maps, strict=True)
    ]
    network = frozen(ReaderEnsemble.untrained([part.shape[1] for part in maps], extractor.settings)).to(model.device)
    tuned = frozen(TunedBackbone()).to(model.device) if extractor.settings.tuned_steps else None
    weights = (1.0, config.reader.plain_weight, config.reader.residual_weight)
    return Calibration(
        **common,
        statistics=nothing_unusual(x.shape, model.device),
        reader=Reader(network, statistics, extractor, {}, tuned),
        score_fusion=ScoreFusion((0.0,) * 3, (1.0,) * 3, weights),
        beside_statistics=nothing_unusual((1, 2, *seen.x.shape[2:]), model.device),
    )


def nothing_unusual(shape: tuple[int, ...], device: torch.device | str) -> PixelStatistics:
    """Statistics of maps (B, F, H, W) that leave them as they are."""
    return PixelStatistics(torch.zeros(1, *shape[1:], device=device), torch.ones(1, *shape[1:], device=device))


def patchcore(config: Config, accelerator: Accelerator) -> Work:
    """A batch of peers/patchcore.py, on the same backbone as the reader, which computes in the same precision."""
    from peers.patchcore import SHARE, Patchcore

    peer, x = Patchcore(0, config), noise_images(config, config.inference.batch_size)[:, 0].numpy()
    device = accelerator.device
    backbone, precision = peer.features.backbone.to(device), reading_precision(config.inference, device)

    def features(images: Tensor) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return [part.float() for part in backbone(images.to(device))]

    peer.features.backbone = features
    patches = peer.features(x[:1]).permute(0, 2, 3, 1).flatten(0, 2)
    remembered = max(1, round(SHARE * PATCHES * len(patches)))
    peer.memory = patches[torch.arange(remembered, device=patches.device) % len(patches)]
    peer.memory = peer.memory + 0.01 * torch.randn_like(peer.memory)

    def step() -> tuple[np.ndarray, np.ndarray]:
        with products_in("float32"):
            return peer.score(x)

    return Work(step, len(x), precision)


def pixel_diffusion_step(config: Config, accelerator: Accelerator) -> Work:
    """One of the steps back of a diffusion model of pixels, of AnoDDPM's size."""
    device, size = accelerator.device, config.inference.batch_size
    down, up = ("DownBlock2D",) * len(ANODDPM), ("UpBlock2D",) * len(ANODDPM)
    shape = {"in_channels": 1, "out_channels": 1, "block_out_channels": ANODDPM, "layers_per_block": 1}
    network = frozen(UNet2DModel(**shape, norm_num_groups=4, down_block_types=down, up_block_types=up)).to(device)
    x = noise_images(config, size).to(device)

    def step() -> Tensor:
        with torch.no_grad(), products_in("float32"):
            return network(x, 100).sample

    return Work(step, size)


# ---------------------------------------------------------------- what they work on


def frozen(network: RadiographVAE | nn.Module) -> nn.Module:
    """As it is used once it is trained."""
    return network.requires_grad_(False).eval()


def noise_images(config: Config, number: int, times: int = 1) -> Tensor:
    """Images (B, 1, k H, k W) in [-1, 1]."""
    return torch.rand(number, 1, times * config.data.height, times * config.data.width) * 2 - 1


def images_in_memory(config: Config) -> RadiographDataset:
    """A few images of noise, as they are when they were read."""
    height, width = config.data.height, config.data.width
    records = [Record(Path(f"{n}.png"), "train", 0, "normal", None, str(n), "file") for n in range(IMAGES)]
    images, nothing = noise_images(config, IMAGES)[:, 0].numpy(), np.zeros(32, np.uint8)
    samples = {
        record.path: Sample(image, None, (height, width), record.patient, nothing)
        for record, image in zip(records, images, strict=True)
    }
    digests = [record.patient for record in records]
    return RadiographDataset(records, config.data, config.runtime.seed, digests, [nothing] * IMAGES, samples)


def latents_on_disk(folder: Path, rows: int, config: Config, channels: int = 4) -> LatentDataset:
    """So many synthetic latents as phase 2 leaves them; a block of noise again and again, for noise takes its time."""
    shape = channels, config.data.height // VAE_DOWNSAMPLING, config.data.width // VAE_DOWNSAMPLING
    folder.mkdir(parents=True, exist_ok=True)
    block = np.random.default_rng(0).standard_normal((min(rows, 1000), *shape), np.float32)
    for split, number in (("train", rows), ("val", 1)):
        array = np.lib.format.open_memmap(folder / f"latents_{split}.npy", "w+", np.float32, (number, *shape))
        for first in range(0, number, len(block)):
            array[first : first + len(block)] = block[: number - first]
        array.flush()
        del array
    hashes = {split: sha256(folder / f"latents_{split}.npy") for split in ("train", "val")}
    known = {"format": FORMAT, "vae_sha256": "", "sha256": hashes, "shape": shape, "rows": {"train": rows, "val": 1}}
    known |= {"mean": (0.0,) * channels, "std": (1.0,) * channels, "preprocessing": {}, "split": {}, "members": {}}
    write_sealed_json(folder / "latents.json", known)
    return LatentDataset(folder, "train")
