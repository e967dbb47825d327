"""Mean and spread of normals per pixel: what a deviation is measured in, for views and for the reader's features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from anomaly import blur_share
from config_reading import CalibrationConfig, ReaderConfig


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation (1, F, H, W) of each feature over normals and neighbouring pixels."""

    mean: Tensor
    std: Tensor

    def standardize(self, values: Tensor) -> Tensor:
        """Features (B, F, H, W) in standard deviations of normals, on the device where these lie."""
        return (values - self.mean) / self.std

    def to(self, device: torch.device | str) -> "PixelStatistics":
        """The same on another device."""
        return PixelStatistics(self.mean.to(device), self.std.to(device))


def pixel_statistics(
    total: Tensor, squares: Tensor, count: int, settings: CalibrationConfig | ReaderConfig
) -> PixelStatistics:
    """From the sums over `count` normals of each feature and of its square, both (1, F, H, W).

    A spread below settings.smallest_spread of the feature's mean spread is not believed.
    """
    mean = blur_share(total / count, settings.alignment)
    variance = blur_share(squares / count, settings.alignment) - mean.square()
    mean, std = mean.float(), variance.clamp_min(0).sqrt().float()
    smallest = settings.smallest_spread * std.mean(dim=(2, 3), keepdim=True)
    return PixelStatistics(mean, std.clamp_min(smallest).clamp_min(1e-8))


def features(views: Tensor, blurs: tuple[float, ...]) -> Tensor:
    """The views at every blur, a share of the height, (B, F, H, W), float32."""
    views = views.float()
    return torch.cat([blur_share(views, blur) for blur in blurs], dim=1)


class NormalViews:
    """The views of all validation normals (N, V, H, W), N >= 2, with the statistics of their features.

    Left out of its own statistics, a validation normal scores as a new normal would; kept in, its scores would be too
    low and every threshold from them too strict.
    """

    def __init__(self, views: Tensor, settings: CalibrationConfig | ReaderConfig, blurs: tuple[float, ...] = (0.0,)):
        self.views = views.half()  # the one thing here whose size grows with N: it may lie on disk
        self.settings, self.blurs = settings, blurs
        self.total, self.squares = 0, 0
        for index in range(len(views)):
            own = self.features(index).double()  # thousands of squares, of which a small difference is taken
            self.total = self.total + own
            self.squares = self.squares + own.square()

    def features(self, index: int) -> Tensor:
        """The features of one normal, (1, F, H, W)."""
        return features(self.views[index : index + 1], self.blurs)

    def statistics(self) -> PixelStatistics:
        """Of all normals."""
        return pixel_statistics(self.total, self.squares, len(self.views), self.settings)

    def statistics_without(self, index: int) -> PixelStatistics:
        """Of all normals but one."""
        own = self.features(index).double()
        return pixel_statistics(self.total - own, self.squares - own.square(), len(self.views) - 1, self.settings)

    def left_out(self, index: int) -> Tensor:
        """The deviations (1, F, H, W) of a normal under the statistics of the others."""
        return self.statistics_without(index).standardize(self.features(index))
