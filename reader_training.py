"""How the reader learns: first what normals show, then, on corrupted normals, how a place looks that does not belong.

Corruptions are drawn when their turn comes and never come again; G is asked about each image anew. A training that was
killed goes on where it was and ends with the same weights.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from checks import UsageError
from config import Config
from corrupted_normals import CorruptedNormals, save_sheet
from corruption import check_fills
from features import FeatureExtractor, with_backbone
from files import load_checkpoint, save_checkpoint
from normalizer import Normalizer
from reader import FeatureStatistics, Reader, statistics_of
from runtime import learning_rate, stream_seed, training_precision

# what a trained reader can be read under: settings that shape no weight
READ_ANEW = ("checkpoint_every", "top_share", "smallest_verdict_spread", "plain_weight")
RECIPE = 3  # raise it when code changes what a reader learns from
READER, LAST, SHEET = "reader.pt", "reader_last.pt", "corruptions.png"  # in the calibration's folder


def reader_identity(model: Normalizer, config: Config, pictures: str) -> dict:
    """What a reader was trained with: another checkpoint, setting or picture is another reader."""
    walk = {name: getattr(config.inference, name) for name in ("noise_level", "draws")}
    walk |= {name: getattr(config.data, name) for name in ("brightness", "contrast", "gamma")}
    settings = with_backbone(config.reader)
    shaping = {name: value for name, value in asdict(settings).items() if name not in READ_ANEW}
    whole = {**model.identity, "recipe": RECIPE, "seed": config.runtime.seed, "pictures": pictures, **walk, **shaping}
    return json.loads(json.dumps(whole))


def train_reader(
    model: Normalizer, images: Sequence[np.ndarray], pictures: str, config: Config, folder: Path
) -> Reader:
    """Train a reader on normals, each float32 (k H, k W) in [-1, 1], and save it as reader.pt in `folder`.

    pictures names them by content. A training that was killed goes on; UsageError if there are fewer than two normals.
    """
    check_fills(config.reader.fills, "reader.fills")
    if len(images) < 2:
        raise UsageError(
            "the reader needs two training normals or more: give data.root some, or use --inference.method plain"
        )
    began, settings = time.monotonic(), with_backbone(config.reader)
    identity = reader_identity(model, config, pictures)
    print(
        f"training the reader on {len(images)} normals, {settings.steps} steps of {settings.batch_size}, backbone "
        f"{settings.backbone}: made once for these checkpoints, kept in {folder}"
    )
    save_sheet(images, config, folder / SHEET)
    run = identity | {"precision": precision_of_training(config, model.device)}
    stored = resume_point(folder / LAST, run, config)
    statistics = statistics_of(stored["statistics"]) if stored else survey(model, images, config)
    rows = images[0].shape[0] // settings.stride
    torch.manual_seed(stream_seed(config.runtime.seed, "reader", "weights"))
    reader = Reader.untrained([part.to(model.device) for part in statistics], rows, settings, identity)
    reader.network.to(model.device)
    fit(reader, model, images, config, run, folder / LAST, stored)
    reader.save(folder / READER)
    (folder / LAST).unlink(missing_ok=True)
    print(f"trained the reader in {(time.monotonic() - began) / 60:.1f} minutes")
    return reader


def resume_point(last: Path, run: dict, config: Config) -> dict | None:
    """What a killed training of this identity left; None if there is nothing of it."""
    if not (config.runtime.resume and last.is_file()):
        return None
    stored = load_checkpoint(last, "reader training", "python inference.py --runtime.resume False")
    if stored["identity"] != run:
        return None
    print(f"the reader goes on from step {stored['step']}")
    return stored


def precision_of_training(config: Config, device: torch.device) -> str:
    """What is computed in while the reader learns: bf16 or no; it is read in float32."""
    return training_precision(config.runtime, device.type == "cpu")


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The same as a context."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_of_training(config, device) == "bf16")


def survey(model: Normalizer, images: Sequence[np.ndarray], config: Config) -> list[FeatureStatistics]:
    """What normals show in each feature map of G, per channel and per place."""
    extractor, size = FeatureExtractor(config.reader), config.inference.batch_size
    sums: list[list] = []
    with tqdm(total=len(images), desc="reader: normals", unit="image") as progress:
        for first in range(0, len(images), size):
            batch = torch.from_numpy(np.stack(images[first : first + size])).unsqueeze(1)
            seen = model.examine(batch, config.reader.magnification)
            with autocast(config, model.device):
                maps = [part.cpu().double() for part in extractor(seen)]
            sums = sums or [[0, 0] for _ in maps]
            for both, values in zip(sums, maps, strict=True):
                both[0] = both[0] + values.sum(0, keepdim=True)
                both[1] = both[1] + values.square().sum(0, keepdim=True)
            progress.update(len(batch))
    return [FeatureStatistics.of(total, squares, len(images), config.reader) for total, squares in sums]


def fit(
    reader: Reader,
    model: Normalizer,
    images: Sequence[np.ndarray],
    config: Config,
    run: dict,
    last: Path,
    stored: dict | None,
) -> None:
    """reader.steps steps of binary cross-entropy on corrupted normals; `last` keeps what a killed run goes on from."""
    settings, network, device = config.reader, reader.network.train(), model.device
    pretrained = list(network.backbone.parameters()) if network.backbone is not None else []
    for parameter in pretrained:
        parameter.requires_grad_(settings.backbone_lr > 0)
    known = {id(parameter) for parameter in pretrained}
    new = [parameter for parameter in network.parameters() if id(parameter) not in known]
    rates = (settings.lr, settings.backbone_lr)
    groups = [{"params": part, "lr": rate} for part, rate in zip((new, pretrained), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    begun = 0
    if stored:
        network.load_state_dict(stored["weights"])
        optimizer.load_state_dict(stored["optimizer"])
        begun = stored["step"]
    numbers = range(begun * settings.batch_size, settings.steps * settings.batch_size)
    workers = config.data.num_workers if numbers else 0
    batches = DataLoader(CorruptedNormals(images, config), settings.batch_size, sampler=numbers, num_workers=workers)
    weight = torch.tensor(settings.positive_weight, device=device)
    running = None
    progress = tqdm(batches, desc="reader: training", initial=begun, total=settings.steps, unit="step")
    for step, (batch, changed) in enumerate(progress, begun):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = learning_rate(step, rate, settings.lr_warmup_steps, settings.steps)
        torch.manual_seed(stream_seed(config.runtime.seed, "reader dropout", step))
        with autocast(config, device):
            logits = reader.verdict(model.examine(batch, settings.magnification)).float()
        share = F.avg_pool2d(changed.to(device), settings.stride)
        loss = F.binary_cross_entropy_with_logits(logits, share, pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            now = float(loss.detach())
            running = now if running is None else 0.9 * running + 0.1 * now
            progress.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % settings.checkpoint_every == 0:
            state = {"weights": network.state_dict(), "optimizer": optimizer.state_dict()}
            whole = {"identity": run, "step": step + 1, "statistics": reader.arrays(), **state}
            save_checkpoint(last, "reader training", whole)
    network.requires_grad_(False).eval()
