"""Many standardized views to one map: a logistic regression per pixel, fitted to generic corruptions of normals.

Deviations are (B, F, H, W), in standard deviations of normals. No lesion and no test image is looked at.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from config import CalibrationConfig

MOST_NORMAL_PIXELS = 100_000  # in all, that the regression is fitted to: thousands of normals share them


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
        logit = torch.einsum("bfhw,f->bhw", evidence(deviations, self.largest), self.weights) + self.bias
        return F.softplus(logit).unsqueeze(1)

    def to(self, device: torch.device | str) -> "Fusion":
        """The same on another device."""
        return Fusion(self.weights.to(device), self.bias, self.largest)


class PixelSample:
    """Pixels drawn from images, with the answer that the regression shall give; of `normals` normal ones, at most."""

    def __init__(self, settings: CalibrationConfig, seed: int, normals: int):
        self.settings = settings
        self.of_each_normal = min(settings.pixels_normal, max(1, MOST_NORMAL_PIXELS // normals))
        self.random = np.random.default_rng(seed)
        self.rows: list[np.ndarray] = []
        self.answers: list[np.ndarray] = []

    def add_normal(self, deviations: Tensor) -> None:
        """Pixels of a normal image (1, F, H, W)."""
        self._add(deviations, np.arange(deviations[0, 0].numel()), self.of_each_normal, False)

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


@dataclass(frozen=True)
class ScoreFusion:
    """One score of an image from the scores of several readings: a weighted sum in standard deviations of normals.

    The weights are given. Fitted to corrupted normals they would hear the reader alone, which has learnt what such
    corruptions look like; the other readings are there for what nobody thought of.
    """

    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, normal: np.ndarray, weights: tuple[float, ...]) -> "ScoreFusion":
        """In units of what each reading says of normals, (N, R), N at least 2."""
        centre, scale = normal.mean(0), normal.std(0, ddof=1) + 1e-6
        return cls(tuple(map(float, centre)), tuple(map(float, scale)), tuple(map(float, weights)))

    def score(self, readings: np.ndarray) -> np.ndarray:
        """(B,) from what the readings say of each image, (B, R)."""
        return (readings - np.array(self.centre)) / np.array(self.scale) @ np.array(self.weights)


def left_out_scores(normal: np.ndarray, weights: tuple[float, ...], patients: Sequence[Hashable]) -> np.ndarray:
    """The score (N,) of each normal in units of those of other patients, three at least: as a new one's would be."""
    rows, whose = range(len(normal)), np.asarray(patients)
    return np.array([ScoreFusion.of(normal[whose != whose[i]], weights).score(normal[i : i + 1])[0] for i in rows])
