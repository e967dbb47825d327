"""Part: the reader's pool, features of every training normal and of its corrupted copies, kept on disk while it learns.

It goes on where it was killed, and is removed when the reader is saved.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from augmentation import exposed_anew, retaken
from config import Config
from corruption import corrupt
from features import FeatureExtractor
from files import write_json
from interruption import Steps, remember
from normalizer import Normalizer
from progress import bar
from reader import Crop, FeatureStatistics, cropped
from runtime import made_ahead, stream_seed
from scratch import array_at
from standardization import pixel_statistics

Item = TypeVar("Item")


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
    kept = KeptRows(folder, len(images) * (1 + settings.copies), identity, config.runtime.resume)
    if kept.done:
        print(f"the features of {kept.done} of {kept.count} images are there already")
    ahead = made_ahead(Pictures(images, kept.count, config), range(kept.done, kept.count), config)
    with bar(total=kept.count, initial=kept.done, desc="reader: features", unit="image") as progress:
        steps = Steps()
        for made in steps.of(in_batches(ahead, size)):
            pictures, shares = (np.stack(parts) for parts in zip(*made, strict=True))
            maps = extractor(model.examine(torch.from_numpy(pictures), settings.magnification))
            kept.add([*(part.half().cpu().numpy() for part in maps), shares])
            if kept.done == kept.count or kept.unkept >= 8 * size or steps.asked:
                kept.keep()
                remember(f"the same command goes on with the reader's features, {kept.done} of {kept.count}")
            progress.update(len(made))
    return Pool(kept.arrays[:-1], kept.arrays[-1], len(images))


def remove_pool(folder: Path) -> None:
    """All of it."""
    (folder / "pool.json").unlink(missing_ok=True)  # first: nobody takes what is half removed for a pool
    shutil.rmtree(folder, ignore_errors=True)


class KeptRows:
    """Arrays (count, ...) in a folder that are filled from the first row on, and go on where a run was killed.

    What is there of another identity, or not whole, is removed.
    """

    def __init__(self, folder: Path, count: int, identity: dict, resume: bool = True):
        self.folder, self.count, self.identity = folder, count, identity
        self.done, self.arrays = self._so_far() if resume else (0, [])
        self.unkept = 0  # rows that a killed run would have to make again
        if not self.done:
            remove_pool(folder)
            folder.mkdir(parents=True)

    def _so_far(self) -> tuple[int, list[np.ndarray]]:
        try:
            stored = json.loads((self.folder / "pool.json").read_text())
            paths = sorted(self.folder.glob("*.npy"))
            for path in paths:
                np.load(path, mmap_mode="r", allow_pickle=False)  # opened to be written, a cut file would only grow
            arrays = [np.load(path, mmap_mode="r+", allow_pickle=False) for path in paths]
            shapes = [list(array.shape) for array in arrays]
            whole = stored["identity"] == self.identity and stored["shapes"] == shapes
            whole &= all(shape[0] == self.count for shape in shapes)
        except (OSError, ValueError, KeyError, TypeError):  # there is nothing, or something else: made anew
            return 0, []
        return (stored["done"], arrays) if whole else (0, [])

    def add(self, parts: list[np.ndarray]) -> None:
        """The next rows of each array, in the same order each time."""
        if not self.arrays:
            self.arrays = [
                array_at(self.folder / f"{number:02d}.npy", part.dtype, (self.count, *part.shape[1:]))
                for number, part in enumerate(parts)
            ]
        end = self.done + len(parts[0])
        self.unkept += len(parts[0])
        for array, part in zip(self.arrays, parts, strict=True):
            array[self.done : end] = part
        self.done = end

    def keep(self) -> None:
        """So far they are whole, also for a later run."""
        for array in self.arrays:
            array.flush()
        shapes = [list(array.shape) for array in self.arrays]
        write_json(self.folder / "pool.json", {"done": self.done, "shapes": shapes, "identity": self.identity})
        self.unkept = 0


class Pictures(Dataset):
    """What the pool's features are of, row by row, and as arrays: tensors of a process take shared memory and files."""

    def __init__(self, images: Sequence[np.ndarray], rows: int, config: Config):
        self.images, self.rows, self.config = images, rows, config

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """An image (1, k H, k W), and the changed share of each place of the reader's grid, uint8 (h, w)."""
        picture, mask = training_image(self.images, number, self.config)
        changed = torch.from_numpy(mask)[None].float()
        shares = (255 * F.avg_pool2d(changed, self.config.reader.stride)[0]).round().byte()
        return picture[None], shares.numpy()


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """So many at a time; the last may be fewer."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def training_image(images: Sequence[np.ndarray], number: int, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Row `number` of the pool: a normal as it is, or a corrupted copy, and what changed in it, bool (k H, k W)."""
    normal = images[number % len(images)]
    if number < len(images):
        return normal, np.zeros(normal.shape, bool)
    random = np.random.default_rng(stream_seed(config.runtime.seed, "reader", number))
    donor = images[random.integers(len(images))]
    if random.random() < 0.5:  # always, and the exposure alone would give a copy away
        normal = exposed_anew(normal, config.data, random).astype(np.float32)
    image, changed = corrupt(normal, donor, random, config.reader)
    return retaken(image, config.reader.machine_blur, config.reader.machine_noise, random), changed
