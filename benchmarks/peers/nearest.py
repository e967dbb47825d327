"""Local nearest neighbour: how far each place is from what training normals show at or beside it.

As in SPADE (Cohen and Hoshen 2020), but neighbours are looked for at the same place of all normals, since panoramics
align roughly, and the distance is in standard deviations of what other normals have there. EfficientNet-Lite0 at
strides 4, 8 and 16, each channel in units of its spread, on a grid of stride 8.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly import blur_share, image_score
from config import Config
from peers.frozen import SIGMA, PatchFeatures, finished_map, in_batches

REACH = 2  # places of the grid, to every side
TOP_SHARE = 0.001  # of the map, whose mean is the score


class Nearest:
    """Every place against a window of all training normals."""

    def __init__(self, seed: int, config: Config):
        self.features = PatchFeatures((4, 8, 16), pooled=True)

    def fit(self, normals: np.ndarray) -> None:
        """Keep the patches of all normals, standardized."""
        values = in_batches(self._patches, normals)
        self.mean = values.mean((0, 2, 3), keepdim=True)
        self.std = values.std((0, 2, 3), keepdim=True)
        self.memory = ((values - self.mean) / self.std).half()  # (N, F, h, w)
        usual = in_batches(lambda rows: self._distances(self.memory[rows].float(), rows), np.arange(len(normals)))
        smooth = blur_share(torch.stack([usual.mean(0), usual.var(0)]).unsqueeze(1), SIGMA)
        self.usual_mean, self.usual_std = smooth[0, 0], smooth[1, 0].sqrt()

    def score(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps of the distance to the nearest neighbour, and the mean of their highest values."""
        distances = self._distances((self._patches(images) - self.mean) / self.std)
        maps = finished_map((distances - self.usual_mean) / self.usual_std, images.shape[1:])
        return maps, image_score(torch.from_numpy(maps).unsqueeze(1), TOP_SHARE).numpy()

    def _distances(self, patches: Tensor, own: np.ndarray | None = None) -> Tensor:
        """To the nearest patch of the memory (B, h, w); own says which of its images these are, to be left out."""
        nearest, size = torch.empty(len(patches), *patches.shape[2:]), 2 * REACH + 1
        for row in range(patches.shape[2]):
            rows = slice(max(0, row - REACH), row + REACH + 1)
            strip = F.pad(self.memory[:, :, rows].float(), (REACH, REACH), value=1e3)  # beyond the border: far away
            windows = strip.unfold(3, size, 1).permute(3, 0, 2, 4, 1).flatten(1, 3)  # (w, candidates, F)
            apart = torch.cdist(patches[:, :, row].permute(2, 0, 1), windows)  # (w, B, candidates)
            if own is not None:
                of_image = apart.unflatten(2, (len(self.memory), -1))
                for position, image in enumerate(own):
                    of_image[:, position, image] = torch.inf
            nearest[:, row] = apart.amin(-1).T
        return nearest

    def _patches(self, images: np.ndarray) -> Tensor:
        return F.avg_pool2d(self.features(images), 2)
