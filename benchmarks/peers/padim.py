"""PaDiM (Defard, Setkov, Loesch, Audigier 2021): a Gaussian of patch features at every place, on EfficientNet-Lite0.

100 of the channels drawn at random, covariances regularized by 0.01, the map blurred, the score its maximum, as
published.
"""

import numpy as np
import torch

from config import Config
from peers.frozen import PatchFeatures, finished_map, in_batches

CHANNELS = 100
EPSILON = 0.01


class Padim:
    """Mahalanobis distance to the training normals at the same place."""

    def __init__(self, seed: int, config: Config):
        self.features = PatchFeatures((4, 8, 16), pooled=False)
        self.random = torch.Generator().manual_seed(seed)

    def fit(self, normals: np.ndarray) -> None:
        """Mean and inverse covariance of every place."""
        _, count, *self.grid = self.features(normals[:1]).shape
        self.channels = torch.randperm(count, generator=self.random)[:CHANNELS]
        values = in_batches(self._chosen, normals)  # (N, F, places)
        self.mean = values.mean(0)
        self.inverse = torch.empty(values.shape[2], CHANNELS, CHANNELS)
        for first in range(0, values.shape[2], 256):
            apart = (values - self.mean)[:, :, first : first + 256].permute(2, 0, 1)
            covariance = apart.transpose(1, 2) @ apart / (len(values) - 1) + EPSILON * torch.eye(CHANNELS)
            self.inverse[first : first + 256] = torch.linalg.inv(covariance)

    def score(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps and their maxima."""
        apart = (self._chosen(images) - self.mean).permute(2, 0, 1)  # (places, B, F)
        squared = ((apart @ self.inverse) * apart).sum(-1).clamp_min(0)
        maps = finished_map(squared.sqrt().T.reshape(len(images), *self.grid), images.shape[1:])
        return maps, maps.max(axis=(1, 2))

    def _chosen(self, images: np.ndarray) -> torch.Tensor:
        """The drawn channels (B, 100, places)."""
        return self.features(images)[:, self.channels].flatten(2)
