"""Many standardized views to one map: a logistic regression per pixel, fitted to generic corruptions of normals.

Deviations are (B, F, H, W), in standard deviations of normals. No lesion and no test image is looked at.
"""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from config import CalibrationConfig


def evidence(deviations: Tensor, largest: float) -> Tensor:
    """The size of each deviation, at most `largest`, and the same with its sign: (B, 2F, H, W)."""
    deviations = deviations.clamp(-largest, largest)
    return torch.cat([deviations.abs(), deviations], dim=1)


@dataclass(frozen=True)
class Fusion:
    """One map from many views: the logistic regression `logit = weights . evidence + bias`."""

    weights: Tensor  # (2F,)
    bias: float
    largest: float  # deviation, in standard deviations

    def anomaly_map(self, deviations: Tensor) -> Tensor:
        """-log P(normal) of every pixel, in nats, (B, 1, H, W): 0 where all is as usual.

        P is the probability under the mix of pixels the regression was fitted to, not a prevalence.
        """
        weights = self.weights.to(deviations.device)
        logit = torch.einsum("bfhw,f->bhw", evidence(deviations, self.largest), weights) + self.bias
        return F.softplus(logit).unsqueeze(1)


class PixelSample:
    """Pixels drawn from images, with the answer that the regression shall give."""

    def __init__(self, settings: CalibrationConfig, seed: int):
        self.settings = settings
        self.random = np.random.default_rng(seed)
        self.rows: list[np.ndarray] = []
        self.answers: list[np.ndarray] = []

    def add_normal(self, deviations: Tensor) -> None:
        """Pixels of a normal image (1, F, H, W)."""
        self._add(deviations, np.arange(deviations[0, 0].numel()), self.settings.pixels_normal, False)

    def add_corrupted(self, deviations: Tensor, changed: np.ndarray) -> None:
        """Pixels of a corrupted image (1, F, H, W), inside and outside of what changed, bool (H, W)."""
        self._add(deviations, np.flatnonzero(changed), self.settings.pixels_inside, True)
        self._add(deviations, np.flatnonzero(~changed), self.settings.pixels_outside, False)

    def _add(self, deviations: Tensor, candidates: np.ndarray, most: int, answer: bool) -> None:
        drawn = self.random.choice(candidates, min(most, len(candidates)), replace=False)
        pixels = deviations.flatten(2)[..., torch.from_numpy(drawn)]
        self.rows.append(evidence(pixels, self.settings.largest_deviation)[0].T.numpy())
        self.answers.append(np.full(len(drawn), answer))

    def fit(self) -> Fusion:
        """The regression that answers best: Newton's method, since the blurs of a view are nearly collinear."""
        regression = LogisticRegression(
            solver="newton-cholesky", C=self.settings.regularization, tol=1e-8, max_iter=100
        )
        rows = np.concatenate(self.rows).astype(np.float64)  # in float32 the slope would never be 0 enough
        regression.fit(rows, np.concatenate(self.answers))
        weights = torch.from_numpy(regression.coef_[0]).float()
        return Fusion(weights, float(regression.intercept_[0]), self.settings.largest_deviation)
