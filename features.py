"""What the reader reads of G: one list of feature maps, each at the resolution where it arises.

A feature is one function and one name: add the function, list it in FEATURES, and name it in reader.features of
config_reading.py. No map is finer than the reader's grid of verdicts, (k H / stride, k W / stride). The name "backbone"
stands for what the reader's own network sees of the radiograph (`reader.py`).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from backbone import STRIDES, backbone_name
from checks import UsageError
from config_reading import ReaderConfig
from normalizer import Examined

Feature = Callable[[Examined, ReaderConfig], list[Tensor]]
BACKBONE = "backbone"


def image(seen: Examined, settings: ReaderConfig) -> list[Tensor]:
    """Mean, highest and lowest grey level of each place."""
    cell = settings.stride
    highest, lowest = F.max_pool2d(seen.detail, cell), -F.max_pool2d(-seen.detail, cell)
    return [torch.cat([F.avg_pool2d(seen.detail, cell), highest, lowest], dim=1)]


def residual(seen: Examined, settings: ReaderConfig) -> list[Tensor]:
    """x - dec(enc(x)) and its size: what the autoencoder cannot say."""
    lost = seen.x - seen.reconstruction
    return [torch.cat([lost, lost.abs()], dim=1)]


def latent(seen: Examined, settings: ReaderConfig) -> list[Tensor]:
    """z, what G changed of it at each noise level, and how far the two heads disagree there."""
    parts = [seen.z]
    for level in settings.levels:
        estimate = seen.estimate(level)
        apart = (estimate.z_diffusion - estimate.z).abs().mean(dim=1, keepdim=True)
        parts += [seen.z - estimate.z, apart]
    return [torch.cat(parts, dim=1)]


def trunk(seen: Examined, settings: ReaderConfig) -> list[Tensor]:
    """What the two heads of G share, at the lowest noise level."""
    return [seen.estimate(min(settings.levels)).features]


def encoder(seen: Examined, settings: ReaderConfig) -> list[Tensor]:
    """What the autoencoder's encoder felt at strides 1, 2 and 4 of x."""
    return seen.encoder_features


FEATURES: dict[str, Feature] = {feature.__name__: feature for feature in (image, residual, latent, trunk, encoder)}


def with_backbone(settings: ReaderConfig) -> ReaderConfig:
    """The settings with reader.backbone resolved, a name or none; UsageError for a feature that nobody knows."""
    known = (*FEATURES, BACKBONE)
    unknown = [name for name in settings.features if name not in known]
    if unknown:
        raise UsageError(f"reader.features: {unknown[0]} is unknown, choose from {', '.join(known)}")
    found = backbone_name(settings.backbone) if BACKBONE in settings.features else "none"
    if found == "none" and set(settings.features) == {BACKBONE}:
        raise UsageError("reader.features holds the backbone alone, and none is installed: name another feature")
    return replace(settings, backbone=found)


class FeatureExtractor:
    """The chosen features of a batch; UsageError for one that nobody knows."""

    def __init__(self, settings: ReaderConfig):
        self.settings = with_backbone(settings)

    @torch.no_grad()
    def __call__(self, seen: Examined) -> list[Tensor]:
        """Feature maps, each (B, F, h, w) with its own F, h and w; UsageError if the sizes do not nest."""
        names = [name for name in self.settings.features if name != BACKBONE]
        names = sorted(names, key=lambda name: name != "encoder")  # it gives z, too
        found = [part for name in names for part in FEATURES[name](seen, self.settings)]
        grid = self.grid(seen)
        maps = [F.adaptive_avg_pool2d(part, grid) if part.shape[-2] > grid[0] else part for part in found]
        self._check_sizes(seen, [tuple(part.shape[-2:]) for part in maps])
        return maps

    def grid(self, seen: Examined) -> tuple[int, int]:
        """How many places get a verdict, down and across."""
        height, width = seen.detail.shape[-2:]
        return height // self.settings.stride, width // self.settings.stride

    def _check_sizes(self, seen: Examined, sizes: list[tuple[int, int]]) -> None:
        """Each resolution must be a whole multiple of every coarser one, and the image of all of them."""
        sizes = [tuple(seen.detail.shape[-2:]), self.grid(seen), *sizes]
        if self.settings.backbone != "none":
            sizes += [tuple(-(-size // stride) for size in sizes[0]) for stride in STRIDES]  # rounded up, as it does
        rows, columns = min(sizes)
        for size in sizes:
            if size[0] % rows or size[1] % columns or size[0] * columns != size[1] * rows:
                raise UsageError(
                    f"the reader's features at {(rows, columns)} and {size} do not nest: use a data.height and a "
                    "data.width that are multiples of 32, or another reader.magnification"
                )
