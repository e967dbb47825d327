"""What validation normals say of the views of what G changed, and how the views become one map.

A normal radiograph also differs from G(x): along tooth edges more than in air. So each view, at several blurs, is standardized per
pixel by what the validation normals show there. How much each standardized view says about an anomaly is then learned, by a
logistic regression per pixel, from generic corruptions implanted into the same validation normals (`corruption.py`); no lesion
and no test image is looked at. Views are (B, V, H, W), features (B, F, H, W) with F = V times the number of blurs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from image_ops import gaussian_blur

BLURS = (1.0, 2.0, 4.0)  # pixels; a lesion of radius r stands out best at a blur near r / 2
ALIGNMENT_SIGMA = 3.0  # pixels; panoramics align only roughly, so a pixel's statistics come from its neighbours too
SMALLEST_SPREAD = 0.3  # of the mean spread of a feature: air would otherwise divide by almost nothing
LARGEST_DEVIATION = 10.0  # standard deviations; beyond, more of the same says nothing new
REGULARIZATION = 0.01  # C of the logistic regression; the features are many and alike
PIXELS_INSIDE, PIXELS_OUTSIDE, PIXELS_NORMAL = (
    300,
    600,
    2000,
)  # drawn from each corrupted image, in and out of what changed, and from each normal


def features(views: Tensor) -> Tensor:
    """The views at every blur, (B, F, H, W), float32."""
    views = views.float()
    return torch.cat([gaussian_blur(views, sigma) for sigma in BLURS], dim=1)


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation (1, F, H, W) of each feature over normals and neighbouring pixels."""

    mean: Tensor
    std: Tensor

    def standardize(self, views: Tensor) -> Tensor:
        """Deviations (B, F, H, W) in standard deviations of normals."""
        return (features(views) - self.mean) / self.std

    def to(self, device: torch.device) -> "PixelStatistics":
        return PixelStatistics(self.mean.to(device), self.std.to(device))


def pixel_statistics(total: Tensor, squares: Tensor, count: int) -> PixelStatistics:
    """From the sums over `count` normals of each feature and of its square, both (1, F, H, W)."""
    mean = gaussian_blur(total / count, ALIGNMENT_SIGMA)
    variance = gaussian_blur(squares / count, ALIGNMENT_SIGMA) - mean.square()
    std = variance.clamp_min(0).sqrt()
    smallest = SMALLEST_SPREAD * std.mean(dim=(2, 3), keepdim=True)
    return PixelStatistics(mean, std.clamp_min(smallest).clamp_min(1e-8))


class NormalViews:
    """The views of all validation normals (N, V, H, W), N >= 2, with their statistics.

    Left out of its own statistics, a validation normal scores as a new normal would; kept in, its scores would be too low and
    every threshold from them too strict.
    """

    def __init__(self, views: Tensor):
        self.views = views.half()  # the one thing here whose size grows with N
        self.total = sum(features(view) for view in self.views.split(1))
        self.squares = sum(features(view).square() for view in self.views.split(1))

    def statistics(self) -> PixelStatistics:
        return pixel_statistics(self.total, self.squares, len(self.views))

    def statistics_without(self, index: int) -> PixelStatistics:
        own = features(self.views[index : index + 1])
        return pixel_statistics(self.total - own, self.squares - own.square(), len(self.views) - 1)


def evidence(deviations: Tensor) -> Tensor:
    """What the regression weighs, (B, 2F, H, W): the size of each deviation, and the deviation with its sign."""
    deviations = deviations.clamp(-LARGEST_DEVIATION, LARGEST_DEVIATION)
    return torch.cat([deviations.abs(), deviations], dim=1)


@dataclass(frozen=True)
class Fusion:
    """One map from many views: the logistic regression `logit = weights . evidence + bias`."""

    weights: Tensor  # (2F,)
    bias: float

    def anomaly_map(self, deviations: Tensor) -> Tensor:
        """-log P(normal) of every pixel, in nats, (B, 1, H, W): 0 where all is as usual, the log-odds of an anomaly where nothing is.

        P is the probability under the mix of pixels the regression was fitted to, not a prevalence.
        """
        logit = torch.einsum("bfhw,f->bhw", evidence(deviations), self.weights) + self.bias
        return F.softplus(logit).unsqueeze(1)

    def to(self, device: torch.device) -> "Fusion":
        return Fusion(self.weights.to(device), self.bias)


def fit_fusion(
    normals: NormalViews, implanted: Iterable[tuple[int, Tensor, np.ndarray]], seed: int
) -> tuple[Fusion, Tensor]:
    """The fusion, and the map (N, 1, H, W) of each normal under the statistics of the others.

    implanted: of each corrupted image, the index of the normal it was made from, its views (1, V, H, W) and the changed pixels,
    bool (H, W). Pixels are drawn with `seed`. Each image is standardized without the normal it is, or was made from.
    """
    random = np.random.default_rng(seed)
    rows, answers = [], []

    def add(deviations: Tensor, candidates: np.ndarray, most: int, answer: bool) -> None:
        pixels = random.choice(candidates, min(most, len(candidates)), replace=False)
        rows.append(evidence(deviations.flatten(2)[..., torch.from_numpy(pixels)])[0].T.numpy())
        answers.append(np.full(len(pixels), answer))

    def own(index: int) -> Tensor:
        return normals.statistics_without(index).standardize(normals.views[index : index + 1])

    for index, views, changed in implanted:
        deviations = normals.statistics_without(index).standardize(views)
        add(deviations, np.flatnonzero(changed), PIXELS_INSIDE, True)
        add(deviations, np.flatnonzero(~changed), PIXELS_OUTSIDE, False)
    for index in range(len(normals.views)):
        deviations = own(index)
        add(deviations, np.arange(deviations[0, 0].numel()), PIXELS_NORMAL, False)
    regression = LogisticRegression(C=REGULARIZATION, max_iter=500).fit(np.concatenate(rows), np.concatenate(answers))
    fusion = Fusion(torch.from_numpy(regression.coef_[0]).float(), float(regression.intercept_[0]))
    return fusion, torch.cat([fusion.anomaly_map(own(index)) for index in range(len(normals.views))])
