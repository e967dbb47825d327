"""What validation normals say of the views of what G changed: per-pixel statistics that turn residuals into standardized scores.

A normal radiograph also differs from G(x): along tooth edges more than in air. A view, standardized per pixel by what the
validation normals show there, says how unusual a difference is at its place. Maps are (B, V, H, W), V views.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from image_ops import gaussian_blur

ALIGNMENT_SIGMA = 3.0  # pixels; panoramics align only roughly, so a pixel's statistics come from its neighbours too
SMALLEST_SPREAD = 0.3  # of the mean spread of a view: air would otherwise divide by almost nothing


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation (1, V, H, W) of each view over normals and neighbouring pixels."""

    mean: Tensor
    std: Tensor

    def fuse(self, views: Tensor) -> Tensor:
        """Root mean square over the views of their standardized excess, (B, 1, H, W), in standard deviations; 0 where no view exceeds a normal.

        Between a mean, which drowns what a single view sees, and a maximum, which takes the noise of every view.
        """
        excess = ((views - self.mean) / self.std).clamp_min(0)
        return excess.square().mean(dim=1, keepdim=True).sqrt()


def pixel_statistics(total: Tensor, squares: Tensor, count: int) -> PixelStatistics:
    """From the sums over `count` normals of each view and of its square, both (1, V, H, W)."""
    mean = gaussian_blur(total / count, ALIGNMENT_SIGMA)
    variance = gaussian_blur(squares / count, ALIGNMENT_SIGMA) - mean.square()
    std = variance.clamp_min(0).sqrt()
    smallest = SMALLEST_SPREAD * std.mean(dim=(2, 3), keepdim=True)
    return PixelStatistics(mean, std.clamp_min(smallest).clamp_min(1e-8))


def calibrate_views(views: Tensor) -> tuple[PixelStatistics, Tensor]:
    """Statistics of normals (N, V, H, W), N >= 2, and the fused map (N, 1, H, W) of each under the statistics of the others.

    Left out of its own statistics, a validation normal scores as a new normal would; kept in, its scores would be too low and
    every threshold from them too strict.
    """
    total, squares, count = views.sum(0, keepdim=True), views.square().sum(0, keepdim=True), len(views)
    fused = [pixel_statistics(total - view, squares - view.square(), count - 1).fuse(view) for view in views.unsqueeze(1)]
    return pixel_statistics(total, squares, count), torch.cat(fused)
