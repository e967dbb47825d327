"""Leaf: tiles of a latent larger than what the UNet sees at once: where they lie, cut out, and put together again.

Knows no network. A corner is a tile's first row and first column; a side longer than the latent is the latent's.
"""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

Corner = tuple[int, int]


def positions(size: tuple[int, int], like: Tensor) -> Tensor:
    """Row and column of each place of a latent (h, w), both from -1 to 1, (2, h, w) in dtype and place of `like`."""
    rows, columns = (torch.linspace(-1, 1, length, device=like.device, dtype=like.dtype) for length in size)
    return torch.stack([rows[:, None].expand(size), columns[None, :].expand(size)])


def fits(size: tuple[int, int], side: int) -> bool:
    """Whether a latent of this size is one tile."""
    return side == 0 or max(size) <= side


def corners(size: tuple[int, int], side: int) -> list[Corner]:
    """Of tiles that cover a latent (h, w), spread evenly; neighbours share at least half of their places."""
    rows, columns = (_starts(length, min(side, length)) for length in size)
    return [(row, column) for row in rows for column in columns]


def _starts(length: int, side: int) -> list[int]:
    count = ceil((length - side) / (side / 2)) + 1
    return [round(number * (length - side) / max(1, count - 1)) for number in range(count)]


def random_corners(count: int, size: tuple[int, int], side: int, random: torch.Generator) -> list[Corner]:
    """Of so many tiles, anywhere within a latent (h, w)."""
    drawn = [torch.randint(max(0, length - side) + 1, (count,), generator=random).tolist() for length in size]
    return list(zip(*drawn, strict=True))


def cut(maps: Tensor, at: Sequence[Corner], side: int) -> Tensor:
    """The tile of each of the maps (B, C, h, w) at its own corner, (B, C, side, side)."""
    return torch.stack(
        [one[:, row : row + side, column : column + side] for one, (row, column) in zip(maps, at, strict=True)]
    )


class Stitched:
    """The mean of tiles (B, C, side, side) over a latent (h, w), each place weighted by how far inside it lies."""

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self.sums: Tensor | float = 0.0
        self.weights: Tensor | float = 0.0

    def add(self, tile: Tensor, at: Corner) -> None:
        """One tile of each of the batch, at the same corner."""
        height, width = tile.shape[-2:]
        box = (..., slice(at[0], at[0] + height), slice(at[1], at[1] + width))
        if isinstance(self.sums, float):
            self.sums = torch.zeros(*tile.shape[:-2], *self.size, device=tile.device)
            self.weights = torch.zeros(self.size, device=tile.device)
        weight = _inside(height, tile)[:, None] * _inside(width, tile)[None, :]
        self.sums[box] += weight * tile
        self.weights[box] += weight

    def mean(self) -> Tensor:
        """Of all that were added, (B, C, h, w), float32."""
        return self.sums / self.weights


def _inside(length: int, like: Tensor) -> Tensor:
    """A triangle: above 0 at the border, 1 in the middle."""
    places = torch.arange(1, length + 1, device=like.device, dtype=torch.float32)
    return torch.minimum(places, length + 1 - places) / ((length + 1) / 2)
