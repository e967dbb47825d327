"""The normalizer G with its trained networks, and the views of what G changed.

Images are (B, 1, H, W) in [-1, 1]. The plain map is one view, the mission's formula. The calibrated map is made of many: at several
noise levels, G's one-step estimate is compared with the image, with the VAE's own reconstruction and with the latent, and its two
heads with each other. A lesion shows in some of them; `calibration.py` knows what each shows on normals.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from config import Config, InferenceConfig, UNetConfig, rebuild_phase
from flowdiff_model import FlowDiffUNet
from flowdiff_process import at_unit_variance, clean_from_noise, clean_from_velocity, interpolate, normalizer
from image_ops import residual_components
from latent_dataset import LatentStandard
from model import RadiographVAE, rebuild_vae
from runtime import generator


@dataclass(frozen=True)
class Examined:
    """What G says of a batch before calibration: images and components (B, 1, H, W)."""

    x: Tensor
    normal: Tensor  # G(x), clipped to [-1, 1]
    reconstruction: Tensor  # dec(enc(x)), clipped to [-1, 1]: the error G would make if it changed nothing
    l1: Tensor
    gradient: Tensor
    views: Tensor  # (B, V, H, W): what the anomaly map is made of


class Normalizer:
    """G with the networks of phases 1 and 3, each rebuilt from its own checkpoint, in float32."""

    def __init__(self, vae_checkpoint: dict, flow_checkpoint: dict, config: Config, device: torch.device):
        self.settings, self.seed, self.device = config.inference, config.runtime.seed, device
        self.vae: RadiographVAE = rebuild_vae(vae_checkpoint).to(device)
        self.standard = LatentStandard(tuple(flow_checkpoint["mean"]), tuple(flow_checkpoint["std"]))
        self.network = FlowDiffUNet(
            rebuild_phase(UNetConfig, flow_checkpoint["config"]["unet"]), flow_checkpoint["latent_channels"]
        )
        self.network.load_state_dict(flow_checkpoint["weights"])
        self.network.to(device).requires_grad_(False).eval()

    def predict(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(at_unit_variance(z_t, t), t)

    def draws(self, z: Tensor) -> list[Tensor]:
        """The noise of each draw, the shape of z. Every image gets the same: its score must not depend on its neighbours."""
        noises = (
            torch.randn(z.shape[1:], generator=generator(self.seed, "inference", draw))
            for draw in range(self.settings.draws)
        )
        return [noise.to(z.device).expand_as(z) for noise in noises]

    def normal_latent(self, z: Tensor) -> Tensor:
        """G(z), the mean over the draws, (B, C, h, w)."""
        level, steps, solver = self.settings.noise_level, self.settings.steps, self.settings.solver
        return torch.stack([normalizer(self.predict, z, level, noise, steps, solver) for noise in self.draws(z)]).mean(
            0
        )

    def clean_estimates(self, z: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """The one-step clean estimates of the flow head and of the diffusion head at this noise level, each the mean over the draws."""
        by_flow, by_diffusion = torch.zeros_like(z), torch.zeros_like(z)
        t = torch.full((len(z),), level, device=z.device)
        for noise in self.draws(z):
            z_t = interpolate(z, noise, level)
            noise_hat, velocity = self.predict(z_t, t)
            by_flow += clean_from_velocity(z_t, velocity, t) / self.settings.draws
            by_diffusion += clean_from_noise(z_t, noise_hat, t) / self.settings.draws
        return by_flow, by_diffusion

    @torch.no_grad()
    def examine(self, images: Tensor) -> Examined:
        """Everything about a batch of images (B, 1, H, W) in [-1, 1]."""
        x = images.to(self.device)
        z = self.standard.standardize(self.vae.encode(x)[0])
        reconstruction, normal = self.decode(z), self.decode(self.normal_latent(z))
        l1, gradient, hf = residual_components(x, normal)
        if self.settings.method == "plain":
            views = combine(l1, gradient, hf, self.settings)
        else:
            views = torch.cat(
                [x - reconstruction, *(self.views(x, z, reconstruction, level) for level in self.settings.levels)],
                dim=1,
            )
        return Examined(x, normal, reconstruction, l1, gradient, views)

    def views(self, x: Tensor, z: Tensor, reconstruction: Tensor, level: float) -> Tensor:
        """What G's one-step estimate at this noise level changed, (B, 6 + C, H, W); residuals keep their sign."""
        z_normal, z_diffusion = self.clean_estimates(z, level)
        normal = self.decode(z_normal)
        return torch.cat(
            [
                x - normal,
                reconstruction - normal,  # without what the VAE alone lost
                combine(*residual_components(x, normal), self.settings),
                combine(*residual_components(reconstruction, normal), self.settings),
                enlarge(
                    (z - z_normal).abs().mean(dim=1, keepdim=True), x
                ),  # what changed before the decoder can hide it
                enlarge(
                    (z_diffusion - z_normal).abs().mean(dim=1, keepdim=True), x
                ),  # the two heads disagree where neither has been
                enlarge(z - z_normal, x),
            ],
            dim=1,
        )

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(self.standard.raw(z)).clamp(-1, 1)


def combine(l1: Tensor, gradient: Tensor, hf: Tensor, settings: InferenceConfig) -> Tensor:
    """The plain anomaly map (B, 1, H, W) from its three components."""
    return settings.alpha_l1 * l1 + settings.beta_grad * gradient + settings.gamma_hf * hf


def enlarge(latent: Tensor, x: Tensor) -> Tensor:
    """A latent quantity at the size of x, bilinear."""
    return F.interpolate(latent, size=x.shape[-2:], mode="bilinear", align_corners=False)
