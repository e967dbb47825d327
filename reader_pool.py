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

from augmentation import exposed_anew
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
    rows = len(images) * (1 + settings.copies)
    done, arrays = rows_so_far(folder, identity) if config.runtime.resume else (0, [])
    if done:
        print(f"the features of {done} of {rows} images are there already")
    else:
        remove_pool(folder)
        folder.mkdir(parents=True)
    with bar(total=rows, initial=done, desc="reader: features", unit="image") as progress:
        steps = Steps()
        ahead = made_ahead(Pictures(images, rows, config), range(done, rows), config)
        for made, first in zip(steps.of(in_batches(ahead, size)), range(done, rows, size), strict=True):
            numbers = range(first, first + len(made))
            pictures, shares = (np.stack(parts) for parts in zip(*made, strict=True))
            seen = model.examine(torch.from_numpy(pictures), settings.magnification)
            maps = [part.half().cpu().numpy() for part in extractor(seen)]
            if not arrays:
                arrays = [
                    array_at(folder / f"{number:02d}.npy", part.dtype, (rows, *part.shape[1:]))
                    for number, part in enumerate([*maps, shares])
                ]
            for array, part in zip(arrays, [*maps, shares], strict=True):
                array[numbers.start : numbers.stop] = part
            if numbers.stop == rows or (first // size) % 8 == 7 or steps.asked:
                keep_rows(folder, identity, arrays, numbers.stop)
                remember(f"the same command goes on with the reader's features, {numbers.stop} of {rows}")
            progress.update(len(numbers))
    return Pool(arrays[:-1], arrays[-1], len(images))


def remove_pool(folder: Path) -> None:
    """All of it."""
    (folder / "pool.json").unlink(missing_ok=True)  # first: nobody takes what is half removed for a pool
    shutil.rmtree(folder, ignore_errors=True)


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
