"""Leaf: crops of images and of their feature maps, and where they lie."""

import numpy as np
import torch
from torch import Tensor

Crop = tuple[float, float, float]  # top and left as shares of the image, and the share of each side that is kept
WHOLE: Crop = (0.0, 0.0, 1.0)


def cropped(maps: Tensor | np.ndarray, crop: Crop) -> Tensor | np.ndarray:
    """The part of (..., h, w) that a crop keeps, not copied; its borders fall between places."""
    (top, left, share), (height, width) = crop, maps.shape[-2:]
    first, across = round(top * height), round(left * width)
    return maps[..., first : first + round(share * height), across : across + round(share * width)]


def quarter(coarsest: tuple[int, int], random: np.random.Generator) -> Crop:
    """Half the height and half the width of an image, its borders between the places of the coarsest map."""
    if min(coarsest) < 2 or coarsest[0] % 2 or coarsest[1] % 2:
        return WHOLE
    tops, lefts = (random.integers(size // 2 + 1) / size for size in coarsest)
    return (float(tops), float(lefts), 0.5)


def positions(size: tuple[int, int], crops: list[Crop], device: torch.device | str) -> Tensor:
    """Where each place lies, row and column in [-1, 1]: (B, 2, h, w) for crops of a grid of this size."""
    rows = torch.linspace(-1, 1, size[0], device=device).reshape(1, 1, -1, 1).expand(1, 1, *size)
    columns = torch.linspace(-1, 1, size[1], device=device).reshape(1, 1, 1, -1).expand(1, 1, *size)
    both = torch.cat([rows, columns], dim=1)
    return torch.cat([cropped(both, crop) for crop in crops])
