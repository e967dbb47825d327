"""Frozen EfficientNet-Lite0 features of patches, as the peers beside this file take them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly import blur_share
from backbone import Backbone

SIGMA = 4 / 256  # of the map's blur, as a share of its height: 4 pixels at 256 in PatchCore and PaDiM


class PatchFeatures:
    """Images (B, H, W) to patch features (B, F, h, w) on the grid of the finest of the chosen strides (2, 4, 8, 16)."""

    def __init__(self, strides: tuple[int, ...], pooled: bool):
        self.backbone, self.strides, self.pooled = Backbone(), strides, pooled

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Tensor:
        maps = dict(zip((2, 4, 8, 16), self.backbone(torch.from_numpy(images).unsqueeze(1)), strict=True))
        chosen = [maps[stride] for stride in self.strides]
        if self.pooled:  # each patch with its neighbours (Roth et al. 2022, eq. 2)
            chosen = [F.avg_pool2d(part, 3, stride=1, padding=1, count_include_pad=False) for part in chosen]
        size = chosen[0].shape[-2:]
        larger = [F.interpolate(part, size=size, mode="bilinear", align_corners=False) for part in chosen[1:]]
        return torch.cat([chosen[0], *larger], dim=1)


def in_batches(function: Callable[[np.ndarray], Tensor], images: np.ndarray, size: int = 8) -> Tensor:
    """What a function of a batch says of many images."""
    return torch.cat([function(images[first : first + size]) for first in range(0, len(images), size)])


def finished_map(distances: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Patch distances (B, h, w) as maps (B, H, W), enlarged and blurred as in PatchCore and PaDiM."""
    larger = F.interpolate(distances.unsqueeze(1), size=size, mode="bilinear", align_corners=False)
    return blur_share(larger, SIGMA)[:, 0].cpu().numpy()
