"""The dual-head UNet: one trunk, two heads. Knows (z_t, t), knows no schedule."""

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from config import UNetConfig
from tiles import corners, cut, fits, places_of, stitched


class FlowDiffUNet(nn.Module):
    """Predicts noise and velocity from a noisy latent in one forward pass.

    The trunk is diffusers' UNet2DModel with its own output layers taken out; each head is norm, activation and a
    convolution that starts at zero, so that training starts from the prediction 0 for both. Two extra input channels
    carry the position: a panoramic is taken in one pose, so where something is belongs to whether it is normal.

    With unet.tile it sees tiles of that side, whose positions are those in the whole: it is given them where it trains
    on tiles, and of a larger latent it reads overlapping ones and gives their mean, so that nobody else knows of it.
    """

    def __init__(self, config: UNetConfig, latent_channels: int):
        super().__init__()
        features, self.tile = config.channels[0], config.tile
        self.trunk = UNet2DModel(
            in_channels=latent_channels + 2,
            out_channels=features,
            block_out_channels=config.channels,
            layers_per_block=config.layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention),
            up_block_types=tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention)),
            attention_head_dim=config.attention_head_dim,
            norm_num_groups=config.norm_groups,
            dropout=config.dropout,
        )
        self.trunk.conv_norm_out = self.trunk.conv_act = self.trunk.conv_out = nn.Identity()
        self.noise_head = _head(features, latent_channels, config.norm_groups)
        self.velocity_head = _head(features, latent_channels, config.norm_groups)

    def forward(self, z_t: Tensor, t: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(noise_hat, velocity_hat), both (B, C, h, w), from z_t (B, C, h, w) at unit variance and t (B,) in [0, 1].

        places: of tiles, where they lie, (B, 2, h, w) cut from tiles.places_of; without, z_t is whole.
        """
        return self.heads_and_features(z_t, t, places)[:2]

    def heads_and_features(self, z_t: Tensor, t: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and the trunk's last features (B, F, h, w), which both heads read."""
        size = z_t.shape[-2:]
        if places is None and not fits(size, self.tile):
            return self._by_tiles(z_t, t)
        if places is None:
            places = places_of(size, z_t.device, z_t.dtype).expand(len(z_t), -1, -1, -1)
        located = torch.cat([z_t, places], dim=1)  # (B, C + 2, h, w)
        timestep = 1000 * t  # diffusers' embedding expects it in [0, 1000)
        features = self.trunk(located, timestep).sample  # (B, F, h, w)
        return self.noise_head(features), self.velocity_head(features), features

    def _by_tiles(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        size = z_t.shape[-2:]
        places = places_of(size, z_t.device, z_t.dtype).expand(len(z_t), -1, -1, -1)
        corner_of_each, parts = corners(size, self.tile), []
        for corner in corner_of_each:
            at = [corner] * len(z_t)
            parts.append(self.heads_and_features(cut(z_t, at, self.tile), t, cut(places, at, self.tile)))
        return tuple(stitched(tiles, corner_of_each, size) for tiles in zip(*parts, strict=True))


def _head(features: int, channels: int, groups: int) -> nn.Sequential:
    convolution = nn.Conv2d(features, channels, kernel_size=3, padding=1)
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return nn.Sequential(nn.GroupNorm(groups, features), nn.SiLU(), convolution)
