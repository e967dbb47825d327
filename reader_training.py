"""How the reader learns: on corrupted training normals.

First a pool of features is made (`reader_pool.py`), then the networks are trained on crops of it. Both go on where they
were killed.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from checks import UsageError
from config import Config
from config_reading import ReaderConfig, told_of
from corruption import check_fills
from features import FeatureExtractor, with_backbone
from interruption import Steps, remember
from last_step import LastStep
from normalizer import Normalizer
from progress import bar
from reader import WHOLE, Crop, FeatureStatistics, Reader, ReaderEnsemble, mirrored, positions, stored_reader
from reader_pool import Pool, make_pool, remove_pool, training_image
from reporting.figures import save_grid
from runtime import EMA, autocast, learning_rate, set_learning_rate, stream_seed, training_precision
from tuned_backbone import TunedBackbone
from tuned_training import fit_tuned

# what a trained reader can be read under: settings that shape no weight
READ_ANEW = (
    *("checkpoint_every", "top_share", "smallest_verdict_spread", "plain_weight", "residual_weight", "tuned_share"),
    "tuned_mirror",
)
# what networks learn with, and no feature in the pool depends on
LEARNING = (
    *("members", "width", "distances", "mirror", "steps", "crops", "lr", "lr_warmup_steps", "weight_decay", "dropout"),
    *("positive_weight", "largest_deviation", "smallest_spread", "alignment", "ema_decay", "precision"),
    *("tuned_steps", "tuned_lr", "tuned_turn", "tuned_stretch", "tuned_unchanged"),
)
# of an identity, what the tuned backbone does not hear of: it sees the image alone, whatever G and the features are
UNSEEN_BY_TUNED = (
    *("vae_sha256", "flow_sha256", "noise_level", "draws", "features", "levels", "stride", "width", "distances"),
    *("mirror", "members", "copies", "steps", "dropout", "largest_deviation", "smallest_spread", "alignment"),
)
RECIPE = 9  # raise it when code or a default changes what a reader learns from, or how it reads
# in the calibration's folder
READER, LAST, TUNED_LAST = "reader.pt", "reader_last.pt", "reader_tuned_last.pt"
POOL, SHEET = "reader_pool", "corruptions.png"


def reader_identity(model: Normalizer, config: Config, pictures: str) -> dict:
    """What a reader was trained with: another checkpoint, setting or picture is another reader."""
    walk = {name: getattr(config.inference, name) for name in ("noise_level", "draws")}
    walk |= {name: getattr(config.data, name) for name in ("brightness", "contrast", "gamma")}
    settings = with_backbone(config.reader)
    shaping = {name: value for name, value in told_of(settings).items() if name not in READ_ANEW}
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
    began, identity = time.monotonic(), reader_identity(model, config, pictures)
    extractor = FeatureExtractor(config.reader, model.device)
    settings = extractor.settings
    print(
        f"training the reader: {settings.members} network(s) of {settings.steps} steps on {len(images)} normals and "
        f"{settings.copies} corrupted copies of each, backbone {settings.backbone} tuned for {settings.tuned_steps} "
        f"steps; made once, kept in {folder}"
    )
    save_sheet(images, config, folder / SHEET)
    run = identity | {"precision": training_precision(config.runtime, model.device.type == "cpu")}
    read = run | {"read_in": config.inference.precision}  # the image is not, which is all that the tuned backbone sees
    made_with = {name: value for name, value in read.items() if name not in LEARNING}
    pool = make_pool(model, extractor, images, config, made_with, folder / POOL)  # first: it may refuse
    tuned = None
    if settings.tuned_steps:
        tuned = tuned_before(folder / READER, identity, config, model.device)
        tuned = tuned or fit_tuned(images, config, run, folder / TUNED_LAST, model.device)
    statistics = pool.statistics(config)
    network = fit_network(pool, statistics, config, read, folder / LAST, model.device)
    on_device = [part.to(model.device) for part in statistics]
    reader = Reader(network, on_device, extractor, identity, tuned)
    reader.save(folder / READER)
    remove_scratch(folder)
    print(f"trained the reader in {(time.monotonic() - began) / 60:.1f} minutes")
    return reader


def tuned_before(path: Path, identity: dict, config: Config, device: torch.device) -> TunedBackbone | None:
    """The tuned backbone of the reader that this one replaces, if it learnt the same: it never saw G.

    The precision it learnt in is not asked for, as it is not of a whole reader. None where there is none, and with
    runtime.resume False.
    """
    if not config.runtime.resume or not path.is_file():
        return None
    stored = stored_reader(path)
    if not stored.get("tuned") or seen_by_tuned(stored["belongs_to"]) != seen_by_tuned(identity):
        return None
    tuned = TunedBackbone()
    tuned.load_state_dict(stored["tuned"])
    print("the tuned backbone of the reader that was here learnt the same, and is kept: it does not depend on G")
    return tuned.to(device).requires_grad_(False).eval()


def seen_by_tuned(identity: dict) -> dict:
    """What of a reader's identity shapes its tuned backbone."""
    return {name: value for name, value in identity.items() if name not in UNSEEN_BY_TUNED}


def save_sheet(images: Sequence[np.ndarray], config: Config, path: Path, count: int = 6) -> None:
    """A picture of what the reader learns on: the first corrupted copies, and what changed in them."""
    numbers = range(len(images), len(images) + min(count, len(images)))
    copies = [training_image(images, number, config) for number in numbers]
    rows = [
        ("normal", [images[number % len(images)] for number in numbers]),
        ("corrupted", [copy for copy, _ in copies]),
        ("changed", [2.0 * changed - 1 for _, changed in copies]),
    ]
    save_grid(path, [(label, np.stack(row)) for label, row in rows], columns=3)


def remove_scratch(folder: Path) -> None:
    """What a training needs to go on, and nobody else."""
    for name in (LAST, TUNED_LAST):
        (folder / name).unlink(missing_ok=True)
    remove_pool(folder / POOL)


# ---------------------------------------------------------------- training


def fit_network(
    pool: Pool,
    statistics: list[FeatureStatistics],
    config: Config,
    identity: dict,
    last: Path,
    device: torch.device | str,
) -> ReaderEnsemble:
    """The networks after reader.steps steps of binary cross-entropy, each on crops of the pool of its own.

    Their weights are a moving average of those of the steps.
    """
    settings, seed = config.reader, config.runtime.seed
    torch.manual_seed(stream_seed(seed, "reader", "weights"))
    channels = [part.centre.shape[1] for part in statistics]
    network = ReaderEnsemble.untrained(channels, settings).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    average = EMA(network, settings.ema_decay)
    parts = {"weights": network, "average": average, "optimizer": optimizer}
    kept = LastStep(last, "reader training", identity, parts)
    begun = kept.take_up(config.runtime.resume)
    known = [part.to(device) for part in statistics]
    grid = tuple(pool.changed.shape[1:])
    coarsest = min((part.shape[2:] for part in pool.features), key=lambda size: size[0])
    weight = torch.tensor(settings.positive_weight, device=device)
    running = None
    with bar(total=settings.steps, initial=begun, desc="reader: training", unit="step") as progress:
        steps = Steps()
        for step in steps.of(range(begun, settings.steps)):
            set_learning_rate(optimizer, learning_rate(step, settings.lr, settings.lr_warmup_steps, settings.steps))
            random = np.random.default_rng(stream_seed(seed, "reader crops", step))
            torch.manual_seed(stream_seed(seed, "reader dropout", step))
            optimizer.zero_grad()
            losses = []
            for member in network:
                rows = random.integers(len(pool.changed), size=settings.crops).tolist()
                crops = [_quarter(coarsest, random) for _ in rows]
                inputs = deviations(pool, known, rows, crops, settings)
                sides = [mirrored(crop) for crop in crops] if settings.mirror else []
                opposite = [part.flip(-1) for part in deviations(pool, known, rows, sides, settings)] if sides else []
                changed = pool.changed_share(rows, crops)
                with autocast(config.runtime, torch.device(device)):
                    logits = member(inputs, opposite, positions(grid, crops, device)).float()
                loss = F.binary_cross_entropy_with_logits(logits, changed.to(device), pos_weight=weight)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(member.parameters(), 1.0)
                losses.append(loss.detach())
            optimizer.step()
            average.update(network)
            if step % 50 == 0:
                now = float(torch.stack(losses).mean())
                running = now if running is None else 0.8 * running + 0.2 * now
                progress.set_postfix(loss=f"{running:.4f}", refresh=False)
            progress.update()
            if (step + 1) % settings.checkpoint_every == 0 or steps.asked:
                kept.write(step + 1)
                remember(f"the same command goes on with the reader, step {step + 1} of {settings.steps}")
    lower = f"lower reader.lr, which is {settings.lr:g}, or raise reader.lr_warmup_steps"
    kept.refuse_diverged(f"the reader diverged: {lower}")
    return average.module


def deviations(
    pool: Pool, known: list[FeatureStatistics], rows: Sequence[int], crops: list[Crop], settings: ReaderConfig
) -> list[Tensor]:
    """Features of these crops of the pool as the network reads them, each (B, 2F, ., .), where the statistics are."""
    maps = pool.batch(rows, crops)
    return [
        part.standardize(values.to(part.centre.device), settings.largest_deviation, crops)
        for part, values in zip(known, maps, strict=True)
    ]


def _quarter(coarsest: tuple[int, int], random: np.random.Generator) -> Crop:
    """Half the height and half the width of an image, its borders between the places of the coarsest map."""
    if min(coarsest) < 2 or coarsest[0] % 2 or coarsest[1] % 2:
        return WHOLE
    tops, lefts = (random.integers(size // 2 + 1) / size for size in coarsest)
    return (float(tops), float(lefts), 0.5)
