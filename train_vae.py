"""Phase 1: fine-tune a pretrained Stable Diffusion VAE on normal radiographs.

Reads   the normal radiographs of data.root (train and validation patients)
Writes  outputs/phase1_vae/: checkpoint_best.pt for phases 2 to 4, checkpoint_last.pt to resume, log.csv,
        curves.png, and val_XXXXXX.png with original, reconstruction and residual of validation images

Only the decoder is trained by default, so that the latent space stays the pretrained one.
Look for: PSNR above 30 dB, SSIM towards 0.95, residuals that show noise and no anatomy.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from command_line import parse_config
from config import Config, UsageError
from dataset import RadiographDataset, open_datasets
from files import load_checkpoint, save_checkpoint, write_json
from metrics import psnr
from model import RadiographVAE, pretrained_vae, ssim, vae_loss
from radiographs.manifest import list_records, split_records
from reporting.figures import save_curves, save_grid
from runtime import (
    Meter,
    RunLog,
    StepBatches,
    generator,
    learning_rate,
    plain,
    read_log,
    resume_point,
    run_script,
    set_learning_rate,
    start,
    without,
)

MADE_BY = "python train_vae.py"
GRID_IMAGES = 8


def main() -> None:
    config = parse_config(__doc__)
    settings, seed, out = config.vae, config.runtime.seed, Path(config.vae.output)
    accelerator = start(config.runtime)

    # The same patients in every phase: the split depends on data.root and the seed alone.
    splits = split_records(list_records(config.data.root), config.data, seed)
    normals = {name: splits[name] for name in ("train", "val")}
    datasets = open_datasets(
        normals, config.data, seed, out / "skipped_files.csv", quiet=not accelerator.is_main_process
    )
    train, validation = datasets["train"].augmented(), datasets["val"]
    accelerator.print(
        f"{len(train)} training and {len(validation)} validation radiographs at {config.data.height} x {config.data.width}"
    )

    vae = pretrained_vae(settings)
    trained = [weight for weight in vae.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    accelerator.print(
        f"training {sum(weight.numel() for weight in trained) / 1e6:.2f} M of {sum(w.numel() for w in vae.parameters()) / 1e6:.2f} M weights"
    )

    resumed_config = resumable(config)
    last = resume_point(out / "checkpoint_last.pt", "vae-training", resumed_config, config.runtime.resume, MADE_BY)
    step, best = 0, float("inf")
    if last:
        vae.load_state_dict(last["weights"])
        optimizer.load_state_dict(last["optimizer"])
        step, best = last["step"], last["best"]
        accelerator.print(f"continuing from step {step} of {settings.steps} (--runtime.resume False starts anew)")
    model, optimizer = accelerator.prepare(vae, optimizer)

    batches = StepBatches(
        len(train),
        settings.batch_size,
        step,
        settings.steps,
        seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    loader = DataLoader(
        train, batch_sampler=batches, num_workers=config.data.num_workers, pin_memory=accelerator.device.type == "cuda"
    )
    main_process = accelerator.is_main_process
    log, meter = RunLog(out, "phase1", config, from_step=step, enabled=main_process), Meter()
    if main_process:
        write_json(out / "config.json", plain(config))
        if step == 0:
            best = validate_and_keep(vae, validation, config, accelerator, log, step, best)

    progress = tqdm(loader, desc="phase 1", initial=step, total=settings.steps, disable=not main_process)
    for batch in progress:
        set_learning_rate(optimizer, learning_rate(step, settings.lr, settings.lr_warmup_steps, settings.steps))
        step += 1
        x = batch["image"].to(accelerator.device)
        loss = vae_loss(x, *model(x, posterior_noise(vae, x, config, step, accelerator)), settings)
        if not torch.isfinite(loss.total):
            raise UsageError(
                f"the loss is not finite at step {step}: lower vae.lr and run again; checkpoint_last.pt holds the last good weights"
            )

        accelerator.backward(loss.total)
        grad_norm = accelerator.clip_grad_norm_(trained, settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        meter.add(
            {"loss": loss.total.detach(), **loss.terms, "grad_norm": grad_norm},
            images=len(x) * accelerator.num_processes,
        )
        if step % settings.log_every == 0 or step == settings.steps:
            means = {**loss.terms, **meter.flush()}  # the terms first, so that an n/a stays in the log
            progress.set_postfix(loss=f"{means['loss']:.4f}")
            log.write(
                step,
                {f"train/{name}": value for name, value in means.items()}
                | {"train/lr": optimizer.param_groups[0]["lr"]},
            )
        ends = step == settings.steps
        if main_process and (step % settings.validate_every == 0 or ends):
            best = validate_and_keep(vae, validation, config, accelerator, log, step, best)
        if main_process and (step % config.runtime.checkpoint_every == 0 or ends):
            state = {
                "config": resumed_config,
                "step": step,
                "best": best,
                "weights": vae.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save_checkpoint(out / "checkpoint_last.pt", "vae-training", state)
    accelerator.wait_for_everyone()
    log.close()
    if main_process:
        summarize(out)
    accelerator.end_training()


def resumable(config: Config) -> dict:
    """The part of the config that a resumed run must share: not where files lie, nor how fast they are read."""
    data = without(plain(config.data), "test", "num_workers", "cache_gb")
    return {"data": data, "vae": without(plain(config.vae), "output", "log_every"), "seed": config.runtime.seed}


def posterior_noise(
    vae: RadiographVAE, x: torch.Tensor, config: Config, step: int, accelerator: Accelerator
) -> torch.Tensor | None:
    """Noise to draw z from the posterior while the encoder learns; None, so z is the mean as in phases 2 to 4, while it is frozen."""
    if config.vae.freeze_encoder or not vae.has_posterior:
        return None
    shape = (len(x), vae.latent_channels, x.shape[2] // 8, x.shape[3] // 8)
    return torch.randn(
        shape, generator=generator(config.runtime.seed, "posterior", step, accelerator.process_index)
    ).to(x.device)


@torch.no_grad()
def validate_and_keep(
    vae: RadiographVAE,
    dataset: RadiographDataset,
    config: Config,
    accelerator: Accelerator,
    log: RunLog,
    step: int,
    best: float,
) -> float:
    """Score every validation image in float32, draw the grid, keep the checkpoint if the loss is the lowest so far; returns the lowest."""
    vae.eval()
    meter, shown = Meter(), []
    for batch in DataLoader(dataset, batch_size=config.vae.batch_size):
        x = batch["image"].to(accelerator.device)
        mean, logvar = vae.encode(x)  # by its parts: accelerate has wrapped the forward of the module in autocast
        reconstruction = vae.decode(mean)
        loss = vae_loss(x, reconstruction, mean, logvar, config.vae)
        for original, copy in zip(x, reconstruction.clamp(-1, 1), strict=True):
            meter.add(
                {"psnr": psnr(original.cpu().numpy(), copy.cpu().numpy()), "ssim": ssim(original[None], copy[None])}
            )
            if len(shown) < GRID_IMAGES:
                shown.append((original[0].cpu().numpy(), copy[0].cpu().numpy()))
        for _ in range(len(x)):  # a mean over images: the last batch may be smaller
            meter.add({"loss": loss.total, **loss.terms})
    vae.train()

    scores = meter.flush()
    log.write(step, {f"val/{name}": value for name, value in ({"kl": "n/a", "beta_kl": "n/a"} | scores).items()})
    originals, copies = zip(*shown, strict=True)
    residuals = [x - y for x, y in zip(originals, copies, strict=True)]
    save_grid(
        Path(config.vae.output) / f"val_{step:06d}.png",
        [("original", originals), ("reconstruction", copies), ("residual", residuals)],
        signed=["residual"],
    )
    tqdm.write(
        f"step {step}: validation loss {scores['loss']:.4f}, PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f}"
    )
    if scores["loss"] < best:
        weights = {name: weight.cpu() for name, weight in vae.state_dict().items()}
        content = {"config": plain(config), "recipe": vae.recipe(), "weights": weights, "scores": scores, "step": step}
        save_checkpoint(Path(config.vae.output) / "checkpoint_best.pt", "vae", content)
    return min(best, scores["loss"])


def summarize(out: Path) -> None:
    """The last words of phase 1: what is in checkpoint_best.pt and what to run next."""
    log_curves(out)
    kept = load_checkpoint(out / "checkpoint_best.pt", "vae", MADE_BY)
    scores = kept["scores"]
    print(
        f"kept step {kept['step']}: PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f}, loss {scores['loss']:.4f} -> {out / 'checkpoint_best.pt'}"
    )
    print("next: python extract_latents.py")


def log_curves(out: Path) -> None:
    """curves.png from log.csv: the terms as they enter the validation loss."""
    history = read_log(out)
    names = ("loss", "lambda_pix", "lambda_grad", "lambda_hf", "lambda_ssim", "beta_kl")
    save_curves(
        out / "curves.png",
        {name: history[f"val/{name}"] for name in names if f"val/{name}" in history},
        "phase 1, validation",
    )


if __name__ == "__main__":
    run_script(main)
