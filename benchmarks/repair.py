"""G that was also taught to repair: python benchmarks/repair.py FLAGS --out FOLDER [--repair-steps 400]

    --out FOLDER          where the networks go, as phases 1 and 3 leave them: then
                          python benchmarks/ablation.py FLAGS --outputs FOLDER --rows everything --as "taught to repair"
    --repair-steps N      optimizer steps after those of phase 3
    --repair-lr LR        AdamW learning rate, warmed up, then cosine to a tenth
    --pairs N             corrupted copies of each training normal
    FLAGS                 those of inference.py: whose networks go on, where the normals are, which corruptions
                          (reader.fills and what belongs to them)

Repair training keeps the loss of phase 3 and changes its input. With z_c the latent of a corrupted normal and z that of
the normal itself, z_t = (1 - t) z_c + t noise, and the flow head is to lead from there to z: its target is
(z_t - z) / t, which for z_c = z is the ordinary one. The diffusion head still predicts the noise, so that its clean
estimate is z_c. Half of each batch is corrupted. The error of the flow head is weighted by min(1, (t / 0.25)^2), since
at small t the target is the change over t. A training that was killed goes on.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import interruption

    interruption.begin()  # first: a signal may come during the imports below, too

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from augmentation import exposed_anew, shaping
from checks import UsageError, require
from command_line import parse_command
from config import Config
from corruption import corrupt
from examination import open_normalizer, read_normals
from files import load_checkpoint, save_checkpoint
from flowdiff_loss import stratified_times
from flowdiff_process import at_unit_variance, interpolate
from holding import hold
from interruption import Steps, continues, remember
from last_step import LastStep
from normalizer import Normalizer
from progress import bar
from runtime import (
    EMA,
    autocast,
    generator,
    learning_rate,
    run_script,
    set_learning_rate,
    stream_seed,
    training_precision,
)
from tuned_training import moved

AT_FULL_WEIGHT = 0.25  # the t from which on an error of the flow head counts in full
EMA_DECAY = 0.99
FLOW, LAST = "phase3_flowdiff", "repair_last.pt"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repair-steps", type=int, default=400)
    parser.add_argument("--repair-lr", type=float, default=2e-4)
    parser.add_argument("--pairs", type=int, default=4)
    options, flags = parser.parse_known_args()
    require(options.repair_steps > 0 and options.pairs > 0, "--repair-steps and --pairs must be 1 or more")
    require(0 < options.repair_lr <= 1, f"--repair-lr must lie in (0, 1], got {options.repair_lr}")
    model, config = open_normalizer(parse_command(__doc__, [*flags, "--inference.method", "reader"]))
    for taken, name in ((config.inference.vae_checkpoint, "phase1_vae"), (config.inference.flow_checkpoint, FLOW)):
        if Path(taken).resolve().parent == (options.out / name).resolve():
            raise UsageError("--out is where the networks lie that are to learn on: choose another folder for --out")
    require(not model.network.tile, "repair training sees whole latents: train phase 3 without unet.tile")
    path = options.out / FLOW / "checkpoint_best.pt"
    if path.is_file() and not (options.out / LAST).is_file():
        raise UsageError(f"--out has networks that are not this command's ({FLOW}/{path.name}): choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold(options.out, "repair"):
        learn_on(model, config, path, options)


def learn_on(model: Normalizer, config: Config, path: Path, options: argparse.Namespace) -> None:
    """Pairs, training, and the networks where phase 4 looks for them."""
    pairs, made_from = pairs_of(model, config, options)
    repair(model, pairs, made_from, config, options)
    stored = load_checkpoint(config.inference.flow_checkpoint, "flowdiff", "python train_flowdiff.py")
    save_checkpoint(path, "flowdiff", stored | {"weights": model.network.state_dict()})
    (options.out / "phase1_vae").mkdir(exist_ok=True)
    shutil.copy2(config.inference.vae_checkpoint, options.out / "phase1_vae" / "checkpoint_best.pt")
    print(f"taught to repair: {path}")


def pairs_of(model: Normalizer, config: Config, options: argparse.Namespace) -> tuple[Tensor, dict]:
    """Standardized latents of normals and of their corrupted copies, (N, 2, C, h, w), and all that they follow from.

    Kept for the next command.
    """
    training = read_normals(model, config, "train")
    path = options.out / "pairs.pt"
    made_from = {"pictures": training.pictures, "pairs": options.pairs, "seed": config.runtime.seed, **model.identity}
    made_from |= {"reader": repr(config.reader), "data": repr(shaping(config.data, model.device))}
    made_from |= {"read_in": config.inference.precision}
    if path.is_file():
        kept = load_checkpoint(path, "pairs", f"this command without {path.name}")
        if kept["made_from"] == made_from:
            return kept["latents"], made_from
    found, count, size = [], len(training.images) * options.pairs, config.inference.batch_size
    for first in bar(range(0, count, size), desc="latents", unit="batch"):
        rows = range(first, min(first + size, count))
        pictures = np.stack([picture for row in rows for picture in pair(training.images, row, config)])
        seen = model.examine(torch.from_numpy(pictures).unsqueeze(1), config.reader.magnification)
        found.append(seen.z.detach().cpu().unflatten(0, (-1, 2)))
    save_checkpoint(path, "pairs", {"made_from": made_from, "latents": torch.cat(found)})
    return torch.cat(found), made_from


def pair(images: np.ndarray, row: int, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """A normal, moved and exposed anew, and the same with foreign shapes in it; each float32 (k H, k W)."""
    random = np.random.default_rng(stream_seed(config.runtime.seed, "repair", row))
    settings, donor = config.reader, images[random.integers(len(images))]
    normal = moved(np.asarray(images[row % len(images)]), settings.tuned_turn, settings.tuned_stretch, random)
    normal = exposed_anew(normal, config.data, random).astype(np.float32)
    return normal, corrupt(normal, donor, random, settings)[0]


def repair(model: Normalizer, pairs: Tensor, made_from: dict, config: Config, options: argparse.Namespace) -> None:
    """The model's network learns on, and is left with a moving average of its weights."""
    settings, device, seed = config.flowdiff, model.device, config.runtime.seed
    network = model.network.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.repair_lr, weight_decay=settings.weight_decay)
    average = EMA(network, EMA_DECAY)
    precision = training_precision(config.runtime, device.type == "cpu")
    identity = {"steps": options.repair_steps, "lr": options.repair_lr, "precision": precision, **made_from}
    identity |= {"phase 3": repr(settings)}
    parts = {"weights": network, "average": average, "optimizer": optimizer}
    kept = LastStep(options.out / LAST, "repair", identity, parts, "this command with another --out")
    begun = kept.take_up(config.runtime.resume)
    remember(continues(begun, options.repair_steps))
    with bar(total=options.repair_steps, initial=begun, desc="repair", unit="step") as progress:
        steps = Steps()
        for step in steps.of(range(begun, options.repair_steps)):
            lr = learning_rate(step, options.repair_lr, settings.lr_warmup_steps // 2, options.repair_steps)
            set_learning_rate(optimizer, lr)
            random = generator(seed, "repair", step)
            rows = torch.randint(len(pairs), (settings.batch_size,), generator=random)
            clean, seen = pairs[rows, 0], pairs[rows, 1]
            seen = torch.where(torch.arange(len(rows)).reshape(-1, 1, 1, 1) % 2 == 0, seen, clean)
            noise = torch.randn(clean.shape, generator=random)
            t = stratified_times(len(rows), random).clamp_min(0.01)
            with autocast(config.runtime, device):
                loss = repair_loss(network, *(part.to(device) for part in (clean, seen, noise, t)), config)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), settings.grad_clip)
            optimizer.step()
            average.update(network)
            progress.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
            progress.update()
            if (step + 1) % 50 == 0 or step + 1 == options.repair_steps or steps.asked:
                kept.write(step + 1)
                remember(continues(step + 1, options.repair_steps))
    kept.refuse_diverged("the training diverged: lower --repair-lr")
    network.load_state_dict(average.module.state_dict())
    network.requires_grad_(False).eval()


def repair_loss(
    network: torch.nn.Module, clean: Tensor, seen: Tensor, noise: Tensor, t: Tensor, config: Config
) -> Tensor:
    """Both heads' weighted squared errors; clean, seen, noise (B, C, h, w), t (B,) above 0."""
    z_t = interpolate(seen, noise, t)
    noise_hat, velocity_hat = network(at_unit_variance(z_t, t), t)
    velocity = (z_t - clean) / t.reshape(-1, 1, 1, 1)
    flow = F.mse_loss(velocity_hat.float(), velocity, reduction="none").flatten(1).mean(1)
    weight = (t / AT_FULL_WEIGHT).square().clamp_max(1)
    diff = F.mse_loss(noise_hat.float(), noise)
    return config.flowdiff.lambda_diff * diff + config.flowdiff.lambda_flow * (weight * flow).mean()


if __name__ == "__main__":
    run_script(main)
