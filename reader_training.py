"""How the reader learns: on corrupted training normals, whose features are kept on disk while it trains.

First a pool of features is made, of every normal and of corrupted copies, then the networks are trained on crops of it.
Both go on where they were killed; the pool is removed when the reader is saved.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from augmentation import exposed_anew
from checks import UsageError
from config import Config
from config_reading import ReaderConfig
from corruption import check_fills, corrupt
from features import FeatureExtractor, with_backbone
from files import write_json
from interruption import Steps, remember
from last_step import LastStep
from normalizer import Normalizer
from progress import bar
from reader import WHOLE, Crop, FeatureStatistics, Reader, ReaderEnsemble, cropped, mirrored, positions
from reporting.figures import save_grid
from runtime import EMA, autocast, learning_rate, set_learning_rate, stream_seed, training_precision
from scratch import array_at
from standardization import pixel_statistics
from tuned_training import fit_tuned, made_ahead

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
RECIPE = 9  # raise it when code or a default changes what a reader learns from, or how it reads
# in the calibration's folder
READER, LAST, TUNED_LAST = "reader.pt", "reader_last.pt", "reader_tuned_last.pt"
POOL, SHEET = "reader_pool", "corruptions.png"


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
    tuned = fit_tuned(images, config, run, folder / TUNED_LAST, model.device) if settings.tuned_steps else None
    statistics = pool.statistics(config)
    network = fit_network(pool, statistics, config, read, folder / LAST, model.device)
    on_device = [part.to(model.device) for part in statistics]
    reader = Reader(network, on_device, extractor, identity, tuned)
    reader.save(folder / READER)
    remove_scratch(folder)
    print(f"trained the reader in {(time.monotonic() - began) / 60:.1f} minutes")
    return reader


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
    _remove_pool(folder / POOL)


def _remove_pool(folder: Path) -> None:
    (folder / "pool.json").unlink(missing_ok=True)  # first: nobody takes what is half removed for a pool
    shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- the pool


@dataclass(frozen=True)
class Pool:
    """Features of normals, first as they are, then corrupted, and where they were changed; mapped from disk."""

    features: list[np.ndarray]  # each float16 (N, F, h, w)
    changed: np.ndarray  # uint8 (N, h, w), the changed share of each place of the reader's grid, 255 is all
    plain: int  # the first so many rows are normals as they are

    def statistics(self, config: Config) -> list[FeatureStatistics]:
        """What normals show, per channel and per place."""
        found = []
        for maps in self.features:
            total, squares = 0, 0
            for row in range(self.plain):
                values = torch.from_numpy(np.array(maps[row : row + 1])).double()
                total, squares = total + values, squares + values.square()
            centre = (total / self.plain).mean(dim=(2, 3), keepdim=True)
            spread = (squares / self.plain).mean(dim=(2, 3), keepdim=True) - centre.square()
            least = 2**-8 * centre.abs() + 1e-6  # what half precision cannot tell apart is no spread
            scale = spread.clamp_min(0).sqrt().clamp_min(least)
            places = pixel_statistics(total, squares, self.plain, config.reader)
            places = replace(places, mean=places.mean.float(), std=places.std.clamp_min(least).float())
            found.append(FeatureStatistics(centre.float(), scale.float(), places))
        return found

    def batch(self, rows: Sequence[int], crops: list[Crop]) -> list[Tensor]:
        """Cropped feature maps (B, F, ., .)."""
        return [_parts_of(maps, rows, crops) for maps in self.features]

    def changed_share(self, rows: Sequence[int], crops: list[Crop]) -> Tensor:
        """Of the places of the same crops, (B, 1, ., .) in [0, 1]."""
        return _parts_of(self.changed[:, None], rows, crops) / 255


def _parts_of(array: np.ndarray, rows: Sequence[int], crops: list[Crop]) -> Tensor:
    """Cropped on the disk: the rest is never read."""
    parts = [cropped(array[row], crop) for row, crop in zip(rows, crops, strict=True)]
    return torch.from_numpy(np.stack(parts)).float()


def make_pool(
    model: Normalizer,
    extractor: FeatureExtractor,
    images: Sequence[np.ndarray],
    config: Config,
    identity: dict,
    folder: Path,
) -> Pool:
    """The pool in `folder`: read as far as an interrupted run came, the rest made."""
    settings, size = config.reader, config.inference.batch_size
    rows = len(images) * (1 + settings.copies)
    done, arrays = rows_so_far(folder, identity) if config.runtime.resume else (0, [])
    if done:
        print(f"the features of {done} of {rows} images are there already")
    else:
        _remove_pool(folder)
        folder.mkdir(parents=True)
    pictures = Pictures(images, rows, config)
    with bar(total=rows, initial=done, desc="reader: features", unit="image") as progress:
        steps = Steps()
        batches = made_ahead(pictures, range(done, rows, size), config)
        for (batch, shares), first in zip(steps.of(batches), range(done, rows, size), strict=True):
            numbers = range(first, first + len(batch))
            seen = model.examine(batch, settings.magnification)
            maps = [part.half().cpu().numpy() for part in extractor(seen)]
            if not arrays:
                arrays = [
                    array_at(folder / f"{number:02d}.npy", part.dtype, (rows, *part.shape[1:]))
                    for number, part in enumerate([*maps, shares.numpy()])
                ]
            for array, part in zip(arrays, [*maps, shares.numpy()], strict=True):
                array[numbers.start : numbers.stop] = part
            if numbers.stop == rows or (first // size) % 8 == 7 or steps.asked:
                keep_rows(folder, identity, arrays, numbers.stop)
                remember(f"the same command goes on with the reader's features, {numbers.stop} of {rows}")
            progress.update(len(numbers))
    return Pool(arrays[:-1], arrays[-1], len(images))


class Pictures(Dataset):
    """What the pool's features are of: rows number `first` and up to a batch of them."""

    def __init__(self, images: Sequence[np.ndarray], rows: int, config: Config):
        self.images, self.rows, self.config = images, rows, config

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, first: int) -> tuple[Tensor, Tensor]:
        """Images (B, 1, k H, k W), and the changed share of each place of the reader's grid, uint8 (B, h, w)."""
        numbers = range(first, min(first + self.config.inference.batch_size, self.rows))
        made = [training_image(self.images, number, self.config) for number in numbers]
        changed = torch.from_numpy(np.stack([mask for _, mask in made])).unsqueeze(1).float()
        shares = (255 * F.avg_pool2d(changed, self.config.reader.stride)[:, 0]).round().byte()
        return torch.from_numpy(np.stack([picture for picture, _ in made])).unsqueeze(1), shares


def keep_rows(folder: Path, identity: dict, arrays: list[np.ndarray], done: int) -> None:
    """So many rows are whole, for `rows_so_far`; the arrays lie in `folder`, by their names in this order."""
    for array in arrays:
        array.flush()
    shapes = [list(array.shape) for array in arrays]
    write_json(folder / "pool.json", {"done": done, "shapes": shapes, "identity": identity})


def rows_so_far(folder: Path, identity: dict) -> tuple[int, list[np.ndarray]]:
    """How many rows an interrupted run of this identity left, and its arrays; none where they are not whole."""
    try:
        stored = json.loads((folder / "pool.json").read_text())
        paths = sorted(folder.glob("*.npy"))
        for path in paths:
            np.load(path, mmap_mode="r", allow_pickle=False)  # opened to be written, a cut file would only grow again
        arrays = [np.load(path, mmap_mode="r+", allow_pickle=False) for path in paths]
        whole = stored["identity"] == identity and stored["shapes"] == [list(array.shape) for array in arrays]
    except (OSError, ValueError, KeyError, TypeError):  # there is nothing, or something else: made anew
        return 0, []
    return (stored["done"], arrays) if whole else (0, [])


def training_image(images: Sequence[np.ndarray], number: int, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Row `number` of the pool: a normal as it is, or a corrupted copy, and what changed in it, bool (k H, k W)."""
    normal = images[number % len(images)]
    if number < len(images):
        return normal, np.zeros(normal.shape, bool)
    random = np.random.default_rng(stream_seed(config.runtime.seed, "reader", number))
    donor = images[random.integers(len(images))]
    if random.random() < 0.5:  # always, and the exposure alone would give a copy away
        normal = exposed_anew(normal, config.data, random).astype(np.float32)
    return corrupt(normal, donor, random, config.reader)


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
