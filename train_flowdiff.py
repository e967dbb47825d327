"""Phase 3: train the normalizer, a dual-head UNet on the latents of normal radiographs.

Reads   outputs/phase2_latents/ and outputs/phase1_vae/checkpoint_best.pt
Writes  outputs/phase3_flowdiff/: checkpoint_best.pt for phase 4, checkpoint_generative.pt (EMA weights at phase1_steps, before
        the identity constraint has done its work), checkpoint_last.pt to resume, log.csv, curves.png, and PNGs of samples and
        of G(x) beside x on validation normals

Curriculum: noise prediction and velocity on one path, L_gen = lambda_diff L_diff + lambda_flow L_flow; then the identity
constraint |x - G(x)| on normals comes in, its weight rising from 0 at identity_warmup_start to lambda_id_global at
identity_warmup_end. checkpoint_best.pt has the lowest validation objective, L_gen + lambda_id_global L_id at full weight, which
means the same at every step.
Look for: diff and flow falling and then flat, samples that look like radiographs, G(x) that keeps normal teeth and fillings.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from command_line import parse_config
from config import Config, UsageError
from files import load_checkpoint, save_checkpoint, sha256, write_json
from flowdiff_loss import generative_loss, identity_loss, lambda_identity, loss_by_time, stratified_times
from flowdiff_model import FlowDiffUNet
from flowdiff_process import Predict, at_unit_variance, normalizer, sample
from latent_dataset import LatentDataset, read_latents_json
from model import rebuild_vae
from reporting.figures import save_curves, save_grid
from runtime import (
    Meter,
    RunLog,
    StepBatches,
    build_ema,
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

MADE_BY = "python train_flowdiff.py"
GRID_IMAGES = 8
SAMPLING_STEPS = 25


def main() -> None:
    config = parse_config(__doc__)
    settings, seed, out = config.flowdiff, config.runtime.seed, Path(config.flowdiff.output)
    vae_checkpoint = load_checkpoint(settings.vae_checkpoint, "vae", "python train_vae.py")
    vae_sha256 = sha256(settings.vae_checkpoint)
    if read_latents_json(settings.latents)["vae_sha256"] != vae_sha256:
        raise UsageError(
            f"the latents in {settings.latents} come from another VAE than {settings.vae_checkpoint}: run python extract_latents.py again"
        )
    train, validation = (LatentDataset(settings.latents, split) for split in ("train", "val"))

    accelerator = start(config.runtime)
    vae = rebuild_vae(vae_checkpoint).to(accelerator.device)
    network = FlowDiffUNet(config.unet, latent_channels=train.raw.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    ema = build_ema(network, settings.ema_decay).to(accelerator.device)
    accelerator.print(
        f"{len(train)} training and {len(validation)} validation latents, UNet of {sum(w.numel() for w in network.parameters()) / 1e6:.1f} M weights"
    )

    resumed_config = resumable(config, vae_sha256, train)
    last = resume_point(out / "checkpoint_last.pt", "flowdiff-training", resumed_config, config.runtime.resume, MADE_BY)
    step, best = 0, float("inf")
    if last:
        network.load_state_dict(last["weights"])
        ema.load_state_dict(last["ema"])
        optimizer.load_state_dict(last["optimizer"])
        step, best = last["step"], last["best"]
        accelerator.print(f"continuing from step {step} of {settings.total_steps} (--runtime.resume False starts anew)")
    model, optimizer = accelerator.prepare(network, optimizer)

    def predict(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return model(at_unit_variance(z_t, t), t)

    def decode(z: Tensor) -> Tensor:
        with accelerator.autocast():
            return vae.decode(train.standard.raw(z)).float()

    batches = StepBatches(
        len(train),
        settings.batch_size,
        step,
        settings.total_steps,
        seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    loader = DataLoader(
        train, batch_sampler=batches, num_workers=config.data.num_workers, pin_memory=accelerator.device.type == "cuda"
    )
    main_process = accelerator.is_main_process
    log, meter = RunLog(out, "phase3", config, from_step=step, enabled=main_process), Meter()
    if main_process:
        write_json(out / "config.json", plain(config))
    keep = {
        "config": plain(config),
        "latent_channels": train.raw.shape[1],
        "mean": list(train.standard.mean),
        "std": list(train.standard.std),
    }
    keep["vae_sha256"] = vae_sha256

    progress = tqdm(loader, desc="phase 3", initial=step, total=settings.total_steps, disable=not main_process)
    for z in progress:
        set_learning_rate(optimizer, learning_rate(step, settings.lr, settings.lr_warmup_steps, settings.total_steps))
        step += 1
        random = generator(seed, "flowdiff", step, accelerator.process_index)
        z, noise, t = (
            part.to(accelerator.device)
            for part in (z, torch.randn(z.shape, generator=random), stratified_times(len(z), random))
        )
        loss = generative_loss(predict, z, noise, t, settings)
        total, terms = loss.total, dict(loss.terms)

        weight = lambda_identity(step, settings)
        if weight > 0:
            seen = z[: max(1, round(settings.identity_share * len(z)))]
            walk = torch.randn(seen.shape, generator=random).to(accelerator.device)
            identity = identity_loss(
                training_normalizer(predict, walk, config), seen, decode if settings.identity_space == "pixel" else None
            )
            total = total + weight * identity
            terms |= {"id": identity.detach(), "lambda_id": weight * identity.detach()}
        if not torch.isfinite(total):
            raise UsageError(
                f"the loss is not finite at step {step}: lower flowdiff.lr and run again; checkpoint_last.pt holds the last good weights"
            )

        accelerator.backward(total)
        grad_norm = accelerator.clip_grad_norm_(network.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update_parameters(network)

        by_time = loss_by_time(t, loss.diff, "diff") | loss_by_time(t, loss.flow, "flow")
        meter.add(
            {"loss": total.detach(), **terms, **by_time, "grad_norm": grad_norm},
            images=len(z) * accelerator.num_processes,
        )
        ends = step == settings.total_steps
        if step % settings.log_every == 0 or ends:
            means = meter.flush()
            progress.set_postfix(
                diff=f"{means['diff']:.3f}", flow=f"{means['flow']:.3f}", id=f"{means.get('id', float('nan')):.3f}"
            )
            log.write(
                step,
                {f"train/{n}": v for n, v in means.items()}
                | {"train/lambda_id_now": weight, "train/lr": optimizer.param_groups[0]["lr"]},
            )
        if not main_process:
            continue
        if step % settings.validate_every == 0 or step == settings.identity_warmup_start or ends:
            scores = validate(ema.module, validation, decode, config, accelerator)
            log.write(step, {f"val/{name}": value for name, value in scores.items()})
            tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            if scores["objective"] < best:
                best = scores["objective"]
                save_checkpoint(
                    out / "checkpoint_best.pt",
                    "flowdiff",
                    {**keep, "weights": ema.module.state_dict(), "scores": scores, "step": step},
                )
        if step == settings.phase1_steps:
            save_checkpoint(
                out / "checkpoint_generative.pt",
                "flowdiff",
                {**keep, "weights": ema.module.state_dict(), "scores": {}, "step": step},
            )
        if step % settings.sample_every == 0 or ends:
            draw_samples(ema.module, validation, decode, config, accelerator.device, step)
        if step % config.runtime.checkpoint_every == 0 or ends:
            state = {"weights": network.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(
                out / "checkpoint_last.pt",
                "flowdiff-training",
                {"config": resumed_config, "step": step, "best": best, **state},
            )
    accelerator.wait_for_everyone()
    log.close()
    if main_process:
        summarize(out, config)
    accelerator.end_training()


def resumable(config: Config, vae_sha256: str, train: LatentDataset) -> dict:
    """The part of the config that a resumed run must share, the latents it trains on included."""
    latents = {"rows": len(train), "mean": list(train.standard.mean), "std": list(train.standard.std)}
    flowdiff = without(plain(config.flowdiff), "output", "latents", "vae_checkpoint", "log_every")
    return {
        "unet": plain(config.unet),
        "flowdiff": flowdiff,
        "seed": config.runtime.seed,
        "vae_sha256": vae_sha256,
        "latents": latents,
    }


def training_normalizer(predict: Predict, noise: Tensor, config: Config) -> Callable[[Tensor], Tensor]:
    """G as the identity constraint uses it, with this noise."""
    settings = config.flowdiff
    return lambda z: normalizer(
        predict, z, settings.identity_noise_level, noise, settings.identity_steps, settings.identity_solver
    )


@torch.no_grad()
def validate(
    network: FlowDiffUNet,
    dataset: LatentDataset,
    decode: Callable[[Tensor], Tensor],
    config: Config,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Mean losses of the EMA weights over the validation latents, with the same times and noise at every call.

    `objective` is L_gen + lambda_id_global L_id whatever the step; a small set is gone through several times, for less noise.
    """
    settings, meter = config.flowdiff, Meter()
    random = generator(config.runtime.seed, "validation")
    device = accelerator.device

    def predict(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with accelerator.autocast():
            noise_hat, velocity_hat = network(at_unit_variance(z_t, t), t)
        return noise_hat.float(), velocity_hat.float()

    for repeat in range(max(1, round(128 / len(dataset)))):
        for z in DataLoader(dataset, batch_size=settings.batch_size):
            noise, t = torch.randn(z.shape, generator=random), stratified_times(len(z), random)
            z, noise, t = z.to(device), noise.to(device), t.to(device)
            loss = generative_loss(predict, z, noise, t, settings)
            values = {"diff": loss.terms["diff"], "flow": loss.terms["flow"], "objective": loss.total}
            if repeat == 0 or settings.identity_space == "latent":
                space = decode if settings.identity_space == "pixel" else None
                values["id"] = identity_loss(training_normalizer(predict, noise, config), z, space)
            for _ in range(len(z)):  # a mean over latents: the last batch may be smaller
                meter.add(values)
    scores = meter.flush()
    scores["objective"] += settings.lambda_id_global * scores["id"]
    return scores


@torch.no_grad()
def draw_samples(
    network: FlowDiffUNet,
    dataset: LatentDataset,
    decode: Callable[[Tensor], Tensor],
    config: Config,
    device: torch.device,
    step: int,
) -> None:
    """samples_XXXXXX.png: new images from pure noise by both heads; normals_XXXXXX.png: x, G(x) and what G changed."""
    settings, out = config.flowdiff, Path(config.flowdiff.output)
    z = torch.stack([dataset[row] for row in range(min(GRID_IMAGES, len(dataset)))]).to(device)
    noise = torch.randn(z.shape, generator=generator(config.runtime.seed, "samples")).to(device)

    def predict(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return network(at_unit_variance(z_t, t), t)

    def pictures(latents: Tensor) -> np.ndarray:
        return decode(latents).clamp(-1, 1)[:, 0].cpu().numpy()

    generated = [
        ("flow, Euler", sample(predict, noise, SAMPLING_STEPS, "euler")),
        ("diffusion, DDIM", sample(predict, noise, SAMPLING_STEPS, "ddim")),
    ]
    save_grid(out / f"samples_{step:06d}.png", [(name, pictures(latents)) for name, latents in generated])
    x, normal = (
        pictures(z),
        pictures(normalizer(predict, z, settings.identity_noise_level, noise, SAMPLING_STEPS, "euler")),
    )
    save_grid(
        out / f"normals_{step:06d}.png",
        [("x, decoded", x), ("G(x)", normal), ("x - G(x)", x - normal)],
        signed=["x - G(x)"],
    )


def summarize(out: Path, config: Config) -> None:
    """The last words of phase 3: curves.png, the identity error before and after the curriculum, what to run next."""
    history = read_log(out)
    names = ("objective", "diff", "flow", "id")
    save_curves(
        out / "curves.png",
        {name: history[f"val/{name}"] for name in names if f"val/{name}" in history},
        "phase 3, validation (EMA weights)",
    )
    kept = load_checkpoint(out / "checkpoint_best.pt", "flowdiff", MADE_BY)
    before = [v for s, v in zip(*history["val/id"], strict=True) if s <= config.flowdiff.identity_warmup_start]
    if before:
        after = history["val/id"][1][-1]
        print(
            f"identity error on validation normals ({config.flowdiff.identity_space}): {before[-1]:.4f} before, {after:.4f} after the curriculum"
        )
    print(
        f"kept step {kept['step']}: "
        + ", ".join(f"{n} {v:.4f}" for n, v in kept["scores"].items())
        + f" -> {out / 'checkpoint_best.pt'}"
    )
    print("next: python inference.py")


if __name__ == "__main__":
    run_script(main)
