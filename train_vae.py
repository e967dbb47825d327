"""Phase 1: fine-tune a pretrained Stable Diffusion VAE on normal radiographs.

Reads   the normal radiographs of data.root (train and validation patients)

Writes  outputs/phase1_vae/: checkpoint_best.pt for phases 2 to 4, checkpoint_last.pt to resume, by runtime.keep_every
        others on the way, log.csv, curves.png, and val_XXXXXX.png with original, reconstruction and residual of
        validation images; skipped_local_only.csv and twins_local_only.csv, where files could not be read or one picture
        came twice

        outputs/cache/: the radiographs as they were decoded, for every later phase and run

Only the decoder is trained by default, so that the latent space stays the pretrained one.
The log has every term of the loss unweighted (loss_pix, loss_grad, loss_hf, loss_ssim, loss_kl) and as it enters the
total (weighted_pix and so on); loss_ssim is 1 - SSIM. Those of train/ are of the first process's images.
Look for: PSNR above 30 dB, SSIM towards 0.95, residuals that show noise and no anatomy.
"""

if __name__ == "__main__":
    import interruption

    interruption.begin()  # first: a signal may come during the imports below, too


from collections.abc import Iterable
from math import inf, isfinite, nan
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from augmentation import images_of, on_device, shaping
from checks import UsageError
from command_line import CommandLine, parse_command
from computing import adamw, busy, compiled, continue_optimizer, fast_products, laid_out, leaves_out
from config import VAE_DOWNSAMPLING, Config, VAEConfig
from dataset import RadiographDataset, open_normals
from files import (
    RunIdentity,
    keep_newest,
    load_checkpoint,
    remove_files,
    resume_point,
    save_checkpoint,
    weights_sha256,
    write_json,
)
from guard import StepGuard
from holding import hold
from interruption import Steps, continues, remember
from model import RadiographVAE, pretrained_vae, psnr, ssim, vae_loss
from progress import bar, say
from radiographs.geometry import content
from radiographs.membership import Membership
from reporting.figures import save_curves, save_grid
from run_log import Meter, RunLog, read_log
from runtime import (
    all_stop,
    generator,
    learning_rate,
    own_part,
    plain,
    precision_of,
    run_script,
    said_by_first,
    set_learning_rate,
    shareable,
    start,
    step_loader,
    stream_seed,
    without,
)
from waiting import Waiting

MADE_BY = "python train_vae.py"
ANEW = f"{MADE_BY} --runtime.resume False"
SIX = 6 * "[0-9]"  # digits of a step
FILES_OF_A_RUN = ("checkpoint_*.pt", "log.csv", "curves.png", f"val_{SIX}.png")
ADJUSTABLE = ("vae.steps", "vae.lr", "vae.lr_warmup_steps")  # in a resumed run, with --runtime.resume-changed True
GRID_IMAGES = 8
SSIM_REACH = 5  # pixels to each side that its window hears


def main() -> None:
    """Phase 1, from the command line, top to bottom."""
    command = parse_command(__doc__)
    config = command.config
    settings, seed, out = config.vae, config.runtime.seed, Path(config.vae.output)
    accelerator = start(config.runtime)
    device, main_process = accelerator.device, accelerator.is_main_process

    datasets = open_normals(config.data, seed, out / "skipped_local_only.csv", quiet=not main_process)
    train, validation = datasets["train"].augmented(on_device(config.data, device)), datasets["val"]
    size = f"{config.data.height} x {config.data.width}"
    accelerator.print(f"{len(train)} training and {len(validation)} validation radiographs at {size}")
    fast_products(device)
    vae = laid_out(pretrained_vae(settings), device)
    trained = [weight for weight in vae.parameters() if weight.requires_grad]
    optimizer = adamw(trained, settings.lr, settings.weight_decay, device)
    accelerator.print(f"training {_millions(trained)} of {_millions(vae.parameters())} M weights")

    held = hold(out, "training") if main_process else None
    identity = run_identity(config, datasets, vae, accelerator)
    options, total = config.runtime, settings.steps
    last = resume_point(out / "checkpoint_last.pt", "vae-training", identity, options, MADE_BY, total)
    step, best, skipped, without_gain = 0, inf, 0, 0
    if last:
        vae.load_state_dict(last["weights"])
        continue_optimizer(optimizer, last["optimizer"])
        step, best, skipped = last["step"], last["best"], last["skipped_steps"]
        without_gain = last.get("validations_without_gain", 0)  # a file of an earlier version knows of none
        accelerator.print(f"continuing from step {step} of {total} (--runtime.resume False starts anew)")
        remember(continues(step, total))
    elif main_process:
        print(f"starting anew in {out}")
        remove_files(out, FILES_OF_A_RUN)
    if main_process:
        write_json(out / "config.json", shareable(config))  # first: it says whose the other files are
    model, optimizer = accelerator.prepare(compiled(vae, options, device), optimizer)
    until = step if gains_no_more(without_gain, settings) else total
    loader = step_loader(train, settings.batch_size, (step, until), config, accelerator)

    log = RunLog(out, "phase1", config, from_step=step, enabled=main_process)
    skips = leaves_out(optimizer)
    guard = StepGuard("vae.lr", options.max_skipped_steps, skipped, quiet=not main_process, optimizer=skips)
    handed_on = hand_on(config, vae, datasets)

    def keep(name: str, scores: dict[str, float]) -> None:
        """The weights of this step in a file that later phases read."""
        weights = vae.state_dict()
        guard.check(step, weights)
        save_checkpoint(out / name, "vae", handed_on | {"weights": weights, "scores": scores, "step": step})

    def validated(best: float) -> float:
        """Score the weights of this step, keep them if they are the best so far; returns the lowest loss."""
        scores = validate(vae, validation, config, device, step, waiting)
        log.write(step, {f"val/{name}": value for name, value in scores.items()})
        if not isfinite(scores["loss"]):
            raise UsageError(f"the validation loss is not finite at step {step}: lower vae.lr or the losses' weights")
        if scores["loss"] >= best:
            return best
        keep("checkpoint_best.pt", without_notes(scores))
        return scores["loss"]

    waiting = Waiting(busy(device))
    if main_process and step == 0:
        best = validated(best)

    steps = Steps()
    progress = bar(loader, desc="phase 1", initial=step, total=total, disable=not main_process)
    meter = Meter()
    model.train()
    for batch in steps.of(waiting.of(progress)):
        set_learning_rate(optimizer, learning_rate(step, settings.lr, settings.lr_warmup_steps, total))
        step += 1
        torch.manual_seed(stream_seed(seed, "step", step, accelerator.process_index))  # for dropout
        x = random_crops(images_of(batch, device), config, step, accelerator)
        loss = vae_loss(x, *model(x, posterior_noise(vae, x, config, step, accelerator)), settings)

        accelerator.backward(loss.total)
        grad_norm = accelerator.clip_grad_norm_(trained, settings.grad_clip)
        if guard.passes(step, grad_norm):
            optimizer.step()
            meter.add(guard.counted({"loss": loss.total, **loss.terms, "grad_norm": grad_norm}))
        optimizer.zero_grad(set_to_none=True)
        meter.add({}, images=len(x) * accelerator.num_processes)

        ends, stopping = step == total, all_stop(steps, accelerator)
        validates = step % settings.validate_every == 0 or ends
        if step % settings.log_every == 0 or ends or (validates and settings.patience):  # it may be the last step
            means = meter.flush() | {"lr": optimizer.param_groups[0]["lr"], "skipped_steps": guard.skipped}
            means["waited_for_data"] = waiting.share
            progress.set_postfix(loss=f"{means.get('loss', nan):.4f}", refresh=False)
            log.write(step, {f"train/{name}": value for name, value in means.items()})
        if main_process and validates:
            before, best = best, validated(best)
            without_gain = 0 if best < before else without_gain + 1
        if settings.patience and validates:
            ends = ends or said_by_first(gains_no_more(without_gain, settings), accelerator)
        if main_process and options.keep_every and step % options.keep_every == 0:
            keep(f"checkpoint_step_{step:06d}.pt", {})
            keep_newest(out, "checkpoint_step_*.pt", options.keep_most)
        if main_process and (step % options.checkpoint_every == 0 or ends or stopping):
            guard.check(step, vae.state_dict())
            state = {"weights": vae.state_dict(), "optimizer": optimizer.state_dict(), "identity": identity.plain()}
            state |= {"step": step, "best": best, "skipped_steps": guard.skipped}
            state |= {"validations_without_gain": without_gain}
            save_checkpoint(out / "checkpoint_last.pt", "vae-training", state)
            remember(continues(step, total))
        if ends and step < total and not stopping:
            log.write(step, {"validations_without_gain": without_gain})  # why it ended
            break
    accelerator.wait_for_everyone()
    if step < total and gains_no_more(without_gain, settings):
        say(f"ended at step {step} of {total}: {without_gain} validations without a lower loss (vae.patience)")
    log.close()
    if main_process:
        print(waiting.told())
        summarize(out, command)
        held.close()
    accelerator.end_training()


def run_identity(
    config: Config, datasets: dict[str, RadiographDataset], vae: RadiographVAE, accelerator: Accelerator
) -> RunIdentity:
    """What a resumed run must share: numbers and contents, not where files lie nor how fast they are read."""
    unused = ("patience",) if config.vae.crop else ("patience", "crop")  # what an earlier version did not know
    settings = {
        "data": shaping(config.data, accelerator.device),
        "vae": without(plain(config.vae), "output", "log_every", "pretrained", *unused),
        "runtime": {"seed": config.runtime.seed},
        "number of processes": accelerator.num_processes,
        "precision": precision_of(accelerator),
        **({"compiled": True} if config.runtime.compile else {}),
    }
    scratch = config.vae.pretrained == "scratch"
    inputs = {
        "the training radiographs": datasets["train"].digest,
        "the validation radiographs": datasets["val"].digest,
        "who the training patients are": datasets["train"].patients_digest,
        "who the validation patients are": datasets["val"].patients_digest,
        "the pretrained VAE": "scratch" if scratch else weights_sha256(vae.state_dict()),
    }
    return RunIdentity(settings, inputs, ADJUSTABLE)


def hand_on(config: Config, vae: RadiographVAE, datasets: dict[str, RadiographDataset]) -> dict:
    """What checkpoint_best.pt hands on beside its weights: no later phase has to guess it."""
    patients = {name: [record.patient for record in dataset.records] for name, dataset in datasets.items()}
    digests = {name: dataset.digests for name, dataset in datasets.items()}
    prints = [each for dataset in datasets.values() for each in dataset.prints]
    return {
        "config": shareable(config),
        "recipe": vae.recipe(),
        "preprocessing": config.data.preprocessing,
        "split": config.data.split,
        "members": Membership.of(patients, digests, prints).plain(),
    }


def gains_no_more(without_gain: int, settings: VAEConfig) -> bool:
    """Whether vae.patience ends the run."""
    return 0 < settings.patience <= without_gain


def random_crops(x: Tensor, config: Config, step: int, accelerator: Accelerator) -> Tensor:
    """A square of vae.crop pixels of each image (B, 1, H, W), or the whole where that is 0; a shorter side is whole."""
    if not config.vae.crop:
        return x
    height, width = (min(config.vae.crop, length) for length in x.shape[2:])
    random, whole = generator(config.runtime.seed, "crops", step), len(x) * accelerator.num_processes
    left_over = x.shape[2] - height, x.shape[3] - width
    rows, columns = (torch.randint(pixels + 1, (whole,), generator=random) for pixels in left_over)
    corners = zip(own_part(rows, accelerator).tolist(), own_part(columns, accelerator).tolist(), strict=True)
    parts = [image[:, top : top + height, left : left + width] for image, (top, left) in zip(x, corners, strict=True)]
    return torch.stack(parts)


def posterior_noise(
    vae: RadiographVAE, x: Tensor, config: Config, step: int, accelerator: Accelerator
) -> Tensor | None:
    """Noise to draw z from the posterior while the encoder learns; None while it is frozen: z is the mean, as later."""
    if config.vae.freeze_encoder or not vae.has_posterior:
        return None
    height, width = (size // VAE_DOWNSAMPLING for size in x.shape[2:])
    whole = (len(x) * accelerator.num_processes, vae.latent_channels, height, width)
    noise = torch.randn(whole, generator=generator(config.runtime.seed, "posterior", step))
    return own_part(noise, accelerator).to(x.device, non_blocking=True)


def quality_of(x: Tensor, copy: Tensor, shapes: Iterable[tuple[int, int]], config: Config) -> dict[str, Tensor]:
    """Mean PSNR and SSIM of images of files of these shapes; what "pad" added is no part of them, and easily copied."""
    data, psnrs, ssims = config.data, [], []
    for *pair, shape in zip(x.split(1), copy.split(1), shapes, strict=True):
        rows, columns = content(tuple(map(int, shape)), data.height, data.width, data.fit)
        own = [image[..., rows, columns] for image in pair]
        psnrs.append(psnr(*own))
        ssims.append(ssim(*(own if min(own[0].shape[2:]) > SSIM_REACH else pair)))  # a line of pixels has no structure
    return {"psnr": torch.cat(psnrs).mean(), "ssim": torch.stack(ssims).mean()}


@torch.no_grad()
def validate(
    vae: RadiographVAE, dataset: RadiographDataset, config: Config, device: torch.device, step: int, waiting: Waiting
) -> dict[str, float | str]:
    """Mean scores over the validation images, in float32; val_XXXXXX.png shows the first of them."""
    was_training = vae.training
    vae.eval()
    meter = Meter()
    originals: list[Tensor] = []
    copies: list[Tensor] = []
    for batch in waiting.of(DataLoader(dataset, batch_size=config.vae.batch_size)):
        x = batch["image"].to(device)
        mean, logvar = vae.encode(x)  # by its parts: accelerate has wrapped the forward of the module in autocast
        reconstruction = vae.decode(mean)
        loss = vae_loss(x, reconstruction, mean, logvar, config.vae)
        copy = reconstruction.clamp(-1, 1)
        quality = quality_of(x, copy, zip(batch["original_height"], batch["original_width"], strict=True), config)
        meter.add({"loss": loss.total, **loss.terms, **quality}, weight=len(x))
        if len(originals) < GRID_IMAGES:
            originals += x[:, 0].cpu()
            copies += copy[:, 0].cpu()
    vae.train(was_training)
    draw_grid(Path(config.vae.output) / f"val_{step:06d}.png", originals[:GRID_IMAGES], copies[:GRID_IMAGES])
    scores = meter.flush()
    loss, quality = f"{scores['loss']:.4f}", f"PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f}"
    say(f"step {step}: validation loss {loss}, {quality}")
    return scores


def draw_grid(path: Path, originals: list[Tensor], copies: list[Tensor]) -> None:
    """Original, reconstruction and residual of validation images (H, W), a column each."""
    rows = {
        "original": [x.numpy() for x in originals],
        "reconstruction": [copy.numpy() for copy in copies],
        "residual": [(x - copy).numpy() for x, copy in zip(originals, copies, strict=True)],
    }
    save_grid(path, list(rows.items()), signed=["residual"])


def without_notes(scores: dict[str, float | str]) -> dict[str, float]:
    """The numbers among them."""
    return {name: value for name, value in scores.items() if not isinstance(value, str)}


def summarize(out: Path, command: CommandLine) -> None:
    """The last words of phase 1: curves.png, what is in checkpoint_best.pt and what to run next."""
    history = read_log(out)
    names = ("loss", "weighted_pix", "weighted_grad", "weighted_hf", "weighted_ssim", "weighted_kl")
    curves = {name: history[f"val/{name}"] for name in names if f"val/{name}" in history}
    save_curves(out / "curves.png", curves, "phase 1, validation")
    kept = load_checkpoint(out / "checkpoint_best.pt", "vae", ANEW)
    scores = kept["scores"]
    quality = f"PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f}, loss {scores['loss']:.4f}"
    print(f"kept step {kept['step']}: {quality} -> {out / 'checkpoint_best.pt'}")
    print(f"next: {command.next('extract_latents.py')}")


def _millions(weights: Iterable[Tensor]) -> str:
    return f"{sum(weight.numel() for weight in weights) / 1e6:.2f}"


if __name__ == "__main__":
    run_script(main)
