"""What the reader reads of a radiograph: one list of feature maps, each at the resolution where it arises.

A feature is one function and one name: add the function, list it in FEATURES, and name it in reader.features of
config_reading.py. No map is finer than the reader's grid of verdicts, (k H / stride, k W / stride).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone import Backbone, backbone_name
from checks import UsageError
from config_reading import ReaderConfig
from normalizer import Examined

Feature = Callable[[Examined, ReaderConfig, "Backbone | None"], list[Tensor]]


def image(seen: Examined, settings: ReaderConfig, eye: nn.Module | None) -> list[Tensor]:
    """Mean, highest and lowest grey level of each place."""
    cell = settings.stride
    highest, lowest = F.max_pool2d(seen.detail, cell), -F.max_pool2d(-seen.detail, cell)
    return [torch.cat([F.avg_pool2d(seen.detail, cell), highest, lowest], dim=1)]


def residual(seen: Examined, settings: ReaderConfig, eye: nn.Module | None) -> list[Tensor]:
    """x - dec(enc(x)) and its size: what the autoencoder cannot say."""
    lost = seen.x - seen.reconstruction
    return [torch.cat([lost, lost.abs()], dim=1)]


def latent(seen: Examined, settings: ReaderConfig, eye: nn.Module | None) -> list[Tensor]:
    """z, what G changed of it at each noise level, and how far the two heads disagree there."""
    parts = [seen.z]
    for level in settings.levels:
        estimate = seen.estimate(level)
        apart = (estimate.z_diffusion - estimate.z).abs().mean(dim=1, keepdim=True)
        parts += [seen.z - estimate.z, apart]
    return [torch.cat(parts, dim=1)]


def trunk(seen: Examined, settings: ReaderConfig, eye: nn.Module | None) -> list[Tensor]:
    """What the two heads of G share, at the lowest noise level."""
    return [seen.estimate(min(settings.levels)).features]


def encoder(seen: Examined, settings: ReaderConfig, eye: nn.Module | None) -> list[Tensor]:
    """What the autoencoder's encoder felt at strides 1, 2 and 4 of x."""
    return seen.encoder_features


def backbone(seen: Examined, settings: ReaderConfig, eye: nn.Module | None) -> list[Tensor]:
    """What a network trained on ImageNet feels; nothing where there is none."""
    if eye is None:
        return []
    with seen.model.computing():
        return [part.float() for part in eye(seen.detail)]


FEATURES: dict[str, Feature] = {
    feature.__name__: feature for feature in (image, residual, latent, trunk, encoder, backbone)
}


def with_backbone(settings: ReaderConfig) -> ReaderConfig:
    """The settings with reader.backbone resolved, a name or none; without one nothing is tuned, however it is set."""
    wanted = "backbone" in settings.features or settings.tuned_steps > 0
    name = backbone_name(settings.backbone) if wanted else "none"
    settings = replace(settings, backbone=name)
    if name != "none" and settings.tuned_steps:
        return settings
    usual = ReaderConfig(tuned_steps=0)
    return replace(settings, **{name: getattr(usual, name) for name in vars(usual) if name.startswith("tuned_")})


class FeatureExtractor:
    """The chosen features of a batch; UsageError for a feature that nobody knows."""

    def __init__(self, settings: ReaderConfig, device: torch.device | str):
        unknown = [name for name in settings.features if name not in FEATURES]
        if unknown:
            raise UsageError(f"reader.features: {unknown[0]} is unknown, choose from {', '.join(FEATURES)}")
        self.settings = with_backbone(settings)
        looks = "backbone" in self.settings.features and self.settings.backbone != "none"
        self.eye = Backbone().to(device) if looks else None

    @torch.no_grad()
    def __call__(self, seen: Examined) -> list[Tensor]:
        """Feature maps, each (B, F, h, w) with its own F, h and w; UsageError if the sizes do not nest."""
        names = sorted(self.settings.features, key=lambda name: name != "encoder")  # it gives z, too
        found = [part for name in names for part in FEATURES[name](seen, self.settings, self.eye)]
        if not found:
            raise UsageError("reader.features holds the backbone alone, and none is installed: name another feature")
        grid = self.grid(seen)
        maps = [F.adaptive_avg_pool2d(part, grid) if part.shape[-2] > grid[0] else part for part in found]
        coarsest = min(part.shape[-2] for part in maps), min(part.shape[-1] for part in maps)
        for size in [grid, *(part.shape[-2:] for part in maps)]:
            if size[0] % coarsest[0] or size[1] % coarsest[1] or size[0] * coarsest[1] != size[1] * coarsest[0]:
                raise UsageError(
                    f"the reader's features at {tuple(coarsest)} and {tuple(size)} do not nest: use a data.height and "
                    "a data.width that are multiples of 32, or another reader.magnification"
                )
        return maps

    def grid(self, seen: Examined) -> tuple[int, int]:
        """How many places get a verdict, down and across."""
        height, width = seen.detail.shape[-2:]
        return height // self.settings.stride, width // self.settings.stride
