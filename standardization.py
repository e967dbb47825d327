"""Mean and spread of normals per pixel: what a deviation is measured in, for views and for the reader's features."""

from collections.abc import Hashable, Sequence
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
    """The views of all validation normals (N, V, H, W) of two patients or more, with statistics of their features.

    Left out of the statistics with all of its patient, a validation normal scores as a new patient's would; kept in, or
    beside others of its patient, its scores would be too low and every threshold from them too strict. `patients` says
    whose each is; without it each is somebody else's.
    """

    def __init__(
        self,
        views: Tensor,
        settings: CalibrationConfig | ReaderConfig,
        blurs: tuple[float, ...] = (0.0,),
        patients: Sequence[Hashable] | None = None,
    ):
        self.views = views.half()  # the one thing here whose size grows with N: it may lie on disk
        self.settings, self.blurs = settings, blurs
        self.patients = list(range(len(views)) if patients is None else patients)
        self.known: tuple[Hashable, PixelStatistics] | None = None  # without the patient who was asked for last
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
        """Of all normals but one, and those of the same patient."""
        patient = self.patients[index]
        if self.known is None or self.known[0] != patient:  # images of a patient mostly follow one another
            rows = [row for row, whose in enumerate(self.patients) if whose == patient]
            total, squares = self.total, self.squares
            for row in rows:
                own = self.features(row).double()
                total, squares = total - own, squares - own.square()
            count = len(self.views) - len(rows)
            self.known = patient, pixel_statistics(total, squares, count, self.settings)
        return self.known[1]

    def left_out(self, index: int) -> Tensor:
        """The deviations (1, F, H, W) of a normal under the statistics of other patients."""
        return self.statistics_without(index).standardize(self.features(index))
