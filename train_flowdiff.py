"""Phase 3: train the normalizer, a dual-head UNet on the latents of normal radiographs.

Reads   outputs/phase2_latents/ and outputs/phase1_vae/checkpoint_best.pt

Writes  outputs/phase3_flowdiff/: checkpoint_best.pt for phase 4, checkpoint_generative.pt (EMA weights at phase1_steps,
        before the identity constraint has done its work), checkpoint_last.pt to resume, by runtime.keep_every others on
        the way, log.csv, curves.png, and PNGs of samples and of G(x) beside x on validation normals

Curriculum: noise prediction and velocity on one path, L_gen = lambda_diff L_diff + lambda_flow L_flow; then the
identity constraint |x - G(x)| on normals comes in, its weight rising from 0 at identity_warmup_start to
lambda_id_global at identity_warmup_end. checkpoint_best.pt has the lowest validation objective, L_gen +
lambda_id_global L_id at full weight, of the steps from identity_warmup_end on.
The log has every term unweighted (loss_diff, loss_flow, loss_id) and as it enters the total (weighted_diff and so on),
and lambda_id, the weight of now. Those of train/ are of the first process's latents.
Look for: loss_diff and loss_flow falling and then flat, samples that look like radiographs, G(x) that keeps normal
teeth and fillings.
"""

if __name__ == "__main__":
    import interruption

    interruption.begin()  # first: a signal may come during the imports below, too


from collections.abc import Callable
from math import inf
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from checks import UsageError
from command_line import CommandLine, parse_command
from computing import adamw, busy, compiled, continue_optimizer, fast_products, laid_out, leaves_out
from config import Config, FlowDiffTrainingConfig
from files import (
    RunIdentity,
    keep_newest,
    load_checkpoint,
    remove_files,
    resume_point,
    save_checkpoint,
    sha256,
    write_json,
)
from flowdiff_batch import draw, latent_batches, tiles_of
from flowdiff_loss import generative_loss, identity_loss, lambda_identity, loss_by_time, stratified_times
from flowdiff_model import FlowDiffUNet
from flowdiff_process import Predict, normalizer, sample, two_heads
from guard import StepGuard
from holding import hold
from interruption import Steps, continues, remember
from latent_dataset import LatentDataset, read_latents_json
from model import rebuild_vae
from progress import bar, say
from reporting.figures import save_curves, save_grid
from run_log import Meter, RunLog, read_log
from runtime import (
    EMA,
    all_stop,
    generator,
    learning_rate,
    plain,
    precision_of,
    run_script,
    set_learning_rate,
    shareable,
    start,
    stream_seed,
    without,
)
from waiting import Waiting

MADE_BY = "python train_flowdiff.py"
ANEW = f"{MADE_BY} --runtime.resume False"
SIX = 6 * "[0-9]"  # digits of a step
FILES_OF_A_RUN = ("checkpoint_*.pt", "log.csv", "curves.png", f"samples_{SIX}.png", f"normals_{SIX}.png")
SCHEDULE = ("total_steps", "phase1_steps", "identity_warmup_start", "identity_warmup_end", "lr", "lr_warmup_steps")
ADJUSTABLE = tuple(f"flowdiff.{name}" for name in SCHEDULE)  # in a resumed run, with --runtime.resume-changed True
GRID_IMAGES = 8
SAMPLING_STEPS = 25


def main() -> None:
    """Phase 3, from the command line: the method, top to bottom."""
    command = parse_command(__doc__)
    settings, out = command.config.flowdiff, Path(command.config.flowdiff.output)
    vae_checkpoint = load_checkpoint(settings.vae_checkpoint, "vae", "python train_vae.py")
    vae_sha256 = sha256(settings.vae_checkpoint)
    description = read_latents_json(settings.latents)
    refuse_other_vae(description, vae_sha256, settings)
    config = command.adopt(description, f"{settings.latents}/latents.json")
    train, validation = (LatentDataset(settings.latents, split) for split in ("train", "val"))

    accelerator = start(config.runtime)
    device, main_process = accelerator.device, accelerator.is_main_process
    seed, options, total_steps = config.runtime.seed, config.runtime, settings.total_steps
    fast_products(device)
    vae = laid_out(rebuild_vae(vae_checkpoint).to(device), device)
    network = laid_out(FlowDiffUNet(config.unet, vae.latent_channels).to(device), device)
    ema = EMA(network, settings.ema_decay)
    optimizer = adamw(network.parameters(), settings.lr, settings.weight_decay, device)
    millions = sum(weight.numel() for weight in network.parameters()) / 1e6
    accelerator.print(f"{len(train)} training, {len(validation)} validation latents, UNet of {millions:.1f} M weights")

    held = hold(out, "training") if main_process else None
    identity = run_identity(config, train, validation, vae_sha256, accelerator)
    last = resume_point(out / "checkpoint_last.pt", "flowdiff-training", identity, options, MADE_BY, total=total_steps)
    step, best, best_step, skipped = 0, inf, 0, 0
    if last:
        network.load_state_dict(last["weights"])
        ema.load_state_dict(last["ema"])
        continue_optimizer(optimizer, last["optimizer"])
        step, skipped = last["step"], last["skipped_steps"]
        if competes(last["best_step"], settings):  # it may not, under another schedule
            best, best_step = last["best"], last["best_step"]
        accelerator.print(f"continuing from step {step} of {total_steps} (--runtime.resume False starts anew)")
        remember(continues(step, total_steps))
    elif main_process:
        print(f"starting anew in {out}")
        remove_files(out, FILES_OF_A_RUN)
    if main_process:
        write_json(out / "config.json", shareable(config))  # first: it says whose the other files are
    model, optimizer = accelerator.prepare(compiled(network, options, device), optimizer)
    loader = latent_batches(train, (step, total_steps), config, accelerator)

    def decode(z: Tensor) -> Tensor:
        with accelerator.autocast():
            return vae.decode(train.standard.raw(z)).float()

    log = RunLog(out, "phase3", config, from_step=step, enabled=main_process)
    skips = leaves_out(optimizer)
    guard = StepGuard("flowdiff.lr", options.max_skipped_steps, skipped, quiet=not main_process, optimizer=skips)
    handed_on = hand_on(config, vae_checkpoint, description, vae_sha256)

    def keep(name: str, scores: dict[str, float]) -> None:
        """The EMA weights of this step in a file that phase 4 reads."""
        weights = ema.module.state_dict()
        guard.check(step, weights)
        save_checkpoint(out / name, "flowdiff", handed_on | {"weights": weights, "scores": scores, "step": step})

    steps, waiting = Steps(), Waiting(busy(device))
    progress = bar(loader, desc="phase 3", initial=step, total=total_steps, disable=not main_process)
    meter = Meter()
    model.train()
    for z in steps.of(waiting.of(progress)):
        set_learning_rate(optimizer, learning_rate(step, settings.lr, settings.lr_warmup_steps, total_steps))
        step += 1
        torch.manual_seed(stream_seed(seed, "step", step, accelerator.process_index))  # for dropout
        batch = draw(z, step, config, accelerator)
        loss = generative_loss(two_heads(model, *batch.places), batch.z, batch.noise, batch.t, settings)
        total, terms = loss.total, loss.terms

        lambda_id = lambda_identity(step, settings)
        if lambda_id > 0 and len(batch.seen):
            walk = training_normalizer(two_heads(model, *batch.seen_places), batch.walk, config)
            identity_error = identity_loss(walk, batch.seen, decode if settings.identity_space == "pixel" else None)
            total = total + lambda_id * batch.seen_weight * identity_error
            terms = terms | {"loss_id": identity_error, "weighted_id": lambda_id * identity_error}

        accelerator.backward(total)
        grad_norm = accelerator.clip_grad_norm_(network.parameters(), settings.grad_clip)
        if guard.passes(step, grad_norm):
            optimizer.step()
            ema.update(network, guard.counts)
            by_time = loss_by_time(batch.t, loss.diff, "loss_diff") | loss_by_time(batch.t, loss.flow, "loss_flow")
            meter.add(guard.counted({"loss": total, **terms, "grad_norm": grad_norm, **by_time}))
        optimizer.zero_grad(set_to_none=True)
        meter.add({}, images=len(z) * accelerator.num_processes)

        ends, stopping = step == total_steps, all_stop(steps, accelerator)
        if step % settings.log_every == 0 or ends:
            now = {"lambda_id": lambda_id, "lr": optimizer.param_groups[0]["lr"], "skipped_steps": guard.skipped}
            means = meter.flush() | now | {"waited_for_data": waiting.share}
            known = [name for name in ("diff", "flow", "id") if f"loss_{name}" in means]  # id from the warm-up on
            progress.set_postfix({name: f"{means[f'loss_{name}']:.3f}" for name in known}, refresh=False)
            log.write(step, {f"train/{name}": value for name, value in means.items()})
        if not main_process:
            continue  # and wait at the next gradient while the first validates
        if step % settings.validate_every == 0 or step == settings.identity_warmup_start or ends:
            scores = validate(ema.module, validation, decode, config, accelerator, waiting)
            log.write(step, {f"val/{name}": value for name, value in scores.items()})
            say(f"step {step}: {_shown(scores)}")
            if competes(step, settings) and scores["objective"] < best:
                best, best_step = scores["objective"], step
                keep("checkpoint_best.pt", scores)
        if step == settings.phase1_steps:
            keep("checkpoint_generative.pt", {})
        if options.keep_every and step % options.keep_every == 0:
            keep(f"checkpoint_step_{step:06d}.pt", {})
            keep_newest(out, "checkpoint_step_*.pt", options.keep_most)
        if step % settings.sample_every == 0 or ends:
            draw_samples(ema.module, validation, decode, config, step)
        if step % options.checkpoint_every == 0 or ends or stopping:
            guard.check(step, network.state_dict())
            state = {"weights": network.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "best": best, "best_step": best_step, "skipped_steps": guard.skipped}
            save_checkpoint(out / "checkpoint_last.pt", "flowdiff-training", state | {"identity": identity.plain()})
            remember(continues(step, total_steps))
    accelerator.wait_for_everyone()
    log.close()
    if main_process:
        print(waiting.told())
        summarize(out, settings, command)
        held.close()
    accelerator.end_training()


def refuse_other_vae(description: dict, vae_sha256: str, settings: FlowDiffTrainingConfig) -> None:
    """UsageError where the latents were not made by this VAE."""
    if description["vae_sha256"] != vae_sha256:
        raise UsageError(
            f"the latents in {settings.latents} come from another VAE than {settings.vae_checkpoint}: "
            "run python extract_latents.py again"
        )


def run_identity(
    config: Config, train: LatentDataset, validation: LatentDataset, vae_sha256: str, accelerator: Accelerator
) -> RunIdentity:
    """What a resumed run must share: numbers and contents, not where files lie nor how often it says something."""
    unshared = ("output", "latents", "vae_checkpoint", "log_every", "sample_every", "device_gb")
    unet = plain(config.unet)
    settings = {
        "unet": unet if config.unet.tile else without(unet, "tile"),  # of which earlier runs know nothing
        "flowdiff": without(plain(config.flowdiff), *unshared),
        "runtime": {"seed": config.runtime.seed},
        "number of processes": accelerator.num_processes,
        "precision": precision_of(accelerator),
        **({"compiled": True} if config.runtime.compile else {}),
    }
    inputs = {
        "the training latents": train.sha256,
        "the validation latents": validation.sha256,
        "the VAE": vae_sha256,
    }
    return RunIdentity(settings, inputs, ADJUSTABLE)


def hand_on(config: Config, vae_checkpoint: dict, description: dict, vae_sha256: str) -> dict:
    """What checkpoint_best.pt hands on beside its weights: phase 4 has to guess nothing."""
    return {
        "config": shareable(config),
        "preprocessing": description["preprocessing"],
        "split": description["split"],
        "members": [vae_checkpoint["members"], description["members"]],  # of the VAE, and of this network
        "latent_channels": description["shape"][0],
        "mean": description["mean"],
        "std": description["std"],
        "vae_sha256": vae_sha256,
    }


def competes(step: int, settings: FlowDiffTrainingConfig) -> bool:
    """Whether the weights of this step may be the best: once the identity constraint, if any, has its full weight."""
    return settings.lambda_id_global == 0 or step >= settings.identity_warmup_end


def training_normalizer(predict: Predict, noise: Tensor, config: Config) -> Callable[[Tensor], Tensor]:
    """G as the identity constraint uses it, with this noise."""
    settings = config.flowdiff
    level, steps, solver = settings.identity_noise_level, settings.identity_steps, settings.identity_solver
    return lambda z: normalizer(predict, z, level, noise, steps, solver)


@torch.no_grad()
def validate(
    network: FlowDiffUNet,
    dataset: LatentDataset,
    decode: Callable[[Tensor], Tensor],
    config: Config,
    accelerator: Accelerator,
    waiting: Waiting,
) -> dict[str, float]:
    """Mean losses of the EMA weights over the validation latents, with the same times and noise at every call.

    `objective` is L_gen + lambda_id_global L_id whatever the step; a small set is gone through several times, for less
    noise.
    """
    settings, meter = config.flowdiff, Meter()
    pixels = settings.identity_space == "pixel"
    random = generator(config.runtime.seed, "validation")
    for repeat in range(max(1, round(128 / len(dataset)))):
        for z in waiting.of(DataLoader(dataset, batch_size=settings.batch_size)):
            z, places = tiles_of(z, config.unet.tile, random)
            noise, t = torch.randn(z.shape, generator=random), stratified_times(len(z), random)
            z, noise, t, *places = (part.to(accelerator.device) for part in (z, noise, t, *places))
            predict = two_heads(network, *places)
            with accelerator.autocast():
                values = generative_loss(predict, z, noise, t, settings).terms
                if repeat == 0 or not pixels:
                    walk = training_normalizer(predict, noise, config)
                    values |= {"loss_id": identity_loss(walk, z, decode if pixels else None)}
            meter.add(values, weight=len(z))
    scores = meter.flush()
    scores["weighted_id"] = settings.lambda_id_global * scores["loss_id"]
    scores["objective"] = scores["weighted_diff"] + scores["weighted_flow"] + scores["weighted_id"]
    return scores


@torch.no_grad()
def draw_samples(
    network: FlowDiffUNet, dataset: LatentDataset, decode: Callable[[Tensor], Tensor], config: Config, step: int
) -> None:
    """samples_XXXXXX.png: new images from pure noise by both heads; normals_XXXXXX.png: x, G(x) and what G changed."""
    settings, out = config.flowdiff, Path(config.flowdiff.output)
    device, predict = next(network.parameters()).device, two_heads(network)
    z = torch.stack([dataset[row] for row in range(min(GRID_IMAGES, len(dataset)))]).to(device)
    noise = torch.randn(z.shape, generator=generator(config.runtime.seed, "samples")).to(device)

    def pictures(latents: Tensor) -> np.ndarray:
        return decode(latents).clamp(-1, 1)[:, 0].cpu().numpy()

    flow = pictures(sample(predict, noise, SAMPLING_STEPS, "euler"))
    diffusion = pictures(sample(predict, noise, SAMPLING_STEPS, "ddim"))
    save_grid(out / f"samples_{step:06d}.png", [("flow, Euler", flow), ("diffusion, DDIM", diffusion)])
    x = pictures(z)
    normal = pictures(normalizer(predict, z, settings.identity_noise_level, noise, SAMPLING_STEPS, "euler"))
    rows = [("x, decoded", x), ("G(x)", normal), ("x - G(x)", x - normal)]
    save_grid(out / f"normals_{step:06d}.png", rows, signed=["x - G(x)"])


def summarize(out: Path, settings: FlowDiffTrainingConfig, command: CommandLine) -> None:
    """The last words of phase 3: curves.png, what is kept and what the curriculum did to it, what to run next."""
    history = read_log(out)
    names = ("objective", "loss_diff", "loss_flow", "loss_id")
    curves = {name: history[f"val/{name}"] for name in names if f"val/{name}" in history}
    save_curves(out / "curves.png", curves, "phase 3, validation (EMA weights)")
    kept = load_checkpoint(out / "checkpoint_best.pt", "flowdiff", ANEW)
    scored = zip(*history.get("val/loss_id", ((), ())), strict=True)
    before = [value for step, value in scored if step <= settings.identity_warmup_start]
    if before and settings.lambda_id_global > 0:
        change = f"{before[-1]:.4f} before the curriculum, {kept['scores']['loss_id']:.4f} in what is kept"
        print(f"identity error on validation normals ({settings.identity_space}): {change}")
    print(f"kept step {kept['step']}: {_shown(kept['scores'])} -> {out / 'checkpoint_best.pt'}")
    print(f"next: {command.next('inference.py')}")


def _shown(scores: dict[str, float]) -> str:
    """The scores without the weighted ones, which say the same once more."""
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if not name.startswith("weighted_"))


if __name__ == "__main__":
    run_script(main)
