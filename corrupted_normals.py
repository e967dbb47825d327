"""What the reader learns on: corrupted training normals without end, and a picture of some of them.

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
from dataset import exposed_anew
from reporting.figures import save_grid
from runtime import stream_seed


def corrupted_copy(
    normal: np.ndarray, donor: np.ndarray, random: np.random.Generator, config: Config
) -> tuple[np.ndarray, np.ndarray]:
    """A corrupted copy of a normal, half of them exposed anew, and what changed in it."""
    if random.random() < 0.5:  # always, and the exposure alone would give a copy away
        normal = exposed_anew(normal, config.data, random).astype(np.float32)
    return corrupt(normal, donor, random, config.reader)


class CorruptedNormals(Dataset):
    """Normals drawn at random, most of them corrupted, half of them mirrored.

    An item is an image and the changed share of each of its pixels, both float32 (1, H, W).
    """

    def __init__(self, images: Sequence[np.ndarray], config: Config):
        self.images, self.config = images, config

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng(stream_seed(self.config.runtime.seed, "reader", number))
        image, donor = (self.images[random.integers(len(self.images))] for _ in range(2))
        changed = np.zeros(image.shape, bool)
        if random.random() < self.config.reader.corrupted_share:
            image, changed = corrupted_copy(image, donor, random, self.config)
        both = np.stack([image, changed.astype(np.float32)])
        if random.random() < 0.5:  # the mirrored jaw is another jaw
            both = both[..., ::-1]
        return tuple(torch.from_numpy(both.copy()).unsqueeze(1))


def save_sheet(images: Sequence[np.ndarray], config: Config, path: Path, count: int = 6) -> None:
    """A picture of corruptions: the first normals, a corrupted copy of each, and what changed in it."""
    shown, copies = images[:count], []
    for number, image in enumerate(shown):
        random = np.random.default_rng(stream_seed(config.runtime.seed, "sheet", number))
        copies.append(corrupted_copy(image, images[-1 - number], random, config))
    rows = [
        ("normal", shown),
        ("corrupted", [copy for copy, _ in copies]),
        ("changed", [2.0 * changed - 1 for _, changed in copies]),
    ]
    save_grid(path, [(label, np.stack(row)) for label, row in rows], columns=3)
