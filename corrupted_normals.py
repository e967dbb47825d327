"""What the reader learns on: training normals, corrupted copies of them, and a picture of both.

Images are float32 (H, W) in [-1, 1], what changed in them is bool (H, W). Each is drawn by its number alone, so that a
training that was killed goes on with the same ones.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from config import Config
from corruption import corrupt
from crops import cropped, positions, quarter
from dataset import exposed_anew
from reporting.figures import save_grid
from runtime import stream_seed
from segmenter import COARSEST


def corrupted_copy(
    normal: np.ndarray, images: Sequence[np.ndarray], random: np.random.Generator, config: Config
) -> tuple[np.ndarray, np.ndarray]:
    """A corrupted copy of a normal, with another one as the donor, and what changed."""
    donor = images[random.integers(len(images))]
    if random.random() < 0.5:  # always, and the exposure alone would give a copy away
        normal = exposed_anew(normal, config.data, random).astype(np.float32)
    return corrupt(normal, donor, random, config.reader)


def training_image(images: Sequence[np.ndarray], number: int, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Row `number` of the pool: first the normals as they are, then corrupted copies of each in turn."""
    normal = images[number % len(images)]
    if number < len(images):
        return normal, np.zeros(normal.shape, bool)
    random = np.random.default_rng(stream_seed(config.runtime.seed, "reader", number))
    return corrupted_copy(normal, images, random, config)


class CorruptedCrops(Dataset):
    """Crops without end, each a quarter of a normal, mostly corrupted, half of them mirrored.

    An item is a crop (1, h, w), the changed share of each pixel (1, h, w), and the positions (2, h / 16, w / 16).
    """

    def __init__(self, images: Sequence[np.ndarray], config: Config):
        self.images, self.config = images, config
        self.grid = tuple(size // COARSEST for size in images[0].shape)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        random = np.random.default_rng(stream_seed(self.config.runtime.seed, "segmenter", number))
        image = self.images[random.integers(len(self.images))]
        changed = np.zeros(image.shape, bool)
        if random.random() < self.config.reader.corrupted_share:
            image, changed = corrupted_copy(image, self.images, random, self.config)
        crop = quarter(self.grid, random)
        both = cropped(np.stack([image, changed.astype(np.float32)]), crop)
        places = positions(self.grid, [crop], "cpu")[0]
        if random.random() < 0.5:  # the mirrored jaw is another jaw; its places are those of the screen
            both, places = both[..., ::-1], positions(self.grid, [mirrored(crop)], "cpu")[0]
        image, changed = torch.from_numpy(both.copy()).unsqueeze(1)
        return image, changed, places


def mirrored(crop: tuple[float, float, float]) -> tuple[float, float, float]:
    """Where a crop comes to lie when its image is mirrored, left for right."""
    top, left, share = crop
    return top, 1 - left - share, share


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
