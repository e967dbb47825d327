"""Leaf: tiles of a latent larger than what the UNet sees at once: where they lie, cut out, and put together again.

Knows no network. A corner is a tile's first row and first column; a side longer than the latent is the latent's.
"""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

Corner = tuple[int, int]


def places_of(size: tuple[int, int], device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Row and column of each place of a grid (h, w), both from -1 to 1, (2, h, w)."""
    rows, columns = (torch.linspace(-1, 1, length, device=device, dtype=dtype) for length in size)
    return torch.stack([rows[:, None].expand(size), columns[None, :].expand(size)])


def fits(size: tuple[int, int], side: int) -> bool:
    """Whether a latent of this size is one tile."""
    return side == 0 or max(size) <= side


def corners(size: tuple[int, int], side: int) -> list[Corner]:
    """Of tiles that cover a latent (h, w), spread evenly; neighbours share half of their places or more.

    Of an odd side, which only a network of one level may have, it can be a place less.
    """
    rows, columns = (_starts(length, min(side, length)) for length in size)
    return [(row, column) for row in rows for column in columns]


def _starts(length: int, side: int) -> list[int]:
    count = ceil((length - side) / (side / 2)) + 1
    return [round(number * (length - side) / max(1, count - 1)) for number in range(count)]


def random_corners(count: int, size: tuple[int, int], side: int, random: torch.Generator) -> list[Corner]:
    """Of so many tiles, anywhere within a latent (h, w), as often at a border as those that are read.

    Drawn up to half a tile beyond each border and moved back inside: evenly drawn within, a place at the border would
    be seen least of all, and most tiles of `corners` lie there.
    """
    drawn = [_drawn(count, max(0, length - side), side // 2, random) for length in size]
    return list(zip(*drawn, strict=True))


def _drawn(count: int, last: int, beyond: int, random: torch.Generator) -> list[int]:
    beyond = min(beyond, last)
    return torch.randint(-beyond, last + beyond + 1, (count,), generator=random).clamp(0, last).tolist()


def cut(maps: Tensor, at: Sequence[Corner], side: int) -> Tensor:
    """The tile of each of the maps (B, C, h, w) at its own corner, (B, C, side, side)."""
    return torch.stack(
        [one[:, row : row + side, column : column + side] for one, (row, column) in zip(maps, at, strict=True)]
    )


def stitched(tiles: Sequence[Tensor], at: Sequence[Corner], size: tuple[int, int]) -> Tensor:
    """The mean of tiles, each (B, C, side, side) at its corner of a latent (h, w): (B, C, h, w), float32.

    Each place of a tile is weighted by how far inside it lies.
    """
    sums = torch.zeros(*tiles[0].shape[:2], *size, device=tiles[0].device)
    weights = torch.zeros(size, device=sums.device)
    height, width = tiles[0].shape[-2:]
    inside = _inside(height, sums.device)[:, None] * _inside(width, sums.device)[None, :]
    for tile, (row, column) in zip(tiles, at, strict=True):
        box = (..., slice(row, row + height), slice(column, column + width))
        sums[box] += inside * tile
        weights[box] += inside
    return sums / weights


def _inside(length: int, device: torch.device) -> Tensor:
    """A triangle: above 0 at the border, 1 in the middle."""
    places = torch.arange(1, length + 1, device=device, dtype=torch.float32)
    return torch.minimum(places, length + 1 - places) / ((length + 1) / 2)
