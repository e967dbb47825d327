"""Mean and spread of normals per pixel: what a deviation is measured in, for views and for the reader's features."""

from dataclasses import dataclass

from torch import Tensor

from anomaly import blur_share
from config_reading import CalibrationConfig, ReaderConfig


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation (1, F, H, W) of each feature over normals and neighbouring pixels."""

    mean: Tensor
    std: Tensor

    def standardize(self, values: Tensor) -> Tensor:
        """Features (B, F, H, W) in standard deviations of normals."""
        return (values - self.mean.to(values.device)) / self.std.to(values.device)


def pixel_statistics(
    total: Tensor, squares: Tensor, count: int, settings: CalibrationConfig | ReaderConfig
) -> PixelStatistics:
    """From the sums over `count` normals of each feature and of its square, both (1, F, H, W).

    A spread below settings.smallest_spread of the feature's mean spread is not believed.
    """
    mean = blur_share(total / count, settings.alignment)
    variance = blur_share(squares / count, settings.alignment) - mean.square()
    std = variance.clamp_min(0).sqrt()
    smallest = settings.smallest_spread * std.mean(dim=(2, 3), keepdim=True)
    return PixelStatistics(mean, std.clamp_min(smallest).clamp_min(1e-8))
