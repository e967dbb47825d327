"""The VAE and its losses: any Stable Diffusion autoencoder, as a map from grey radiographs to latents and back."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from checks import UsageError
from config import VAE_DOWNSAMPLING, VAEConfig
from image_ops import residual_components

AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


class RadiographVAE(nn.Module):
    """Radiographs x (B, 1, H, W) in [-1, 1] to latents z (B, C, h, w), H = 8 h, and back.

    A colour autoencoder gets the grey image in all its channels; the mean of what it decodes is the grey image again.
    """

    def __init__(self, autoencoder: AutoencoderKL | AutoencoderTiny):
        super().__init__()
        self.autoencoder = autoencoder
        self.has_posterior = isinstance(autoencoder, AutoencoderKL)
        if not self.has_posterior:
            autoencoder.to(memory_format=torch.channels_last)  # which CPUs convolve fastest; the other gains nothing
        self.latent_channels = autoencoder.config.latent_channels

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the posterior, both (B, C, h, w); a deterministic encoder has no log-variance."""
        coloured = x.expand(-1, self.autoencoder.config.in_channels, -1, -1)
        encoded = self.autoencoder.encode(coloured)
        if self.has_posterior:
            return encoded.latent_dist.mean, encoded.latent_dist.logvar
        return encoded.latents, None

    def encode_with_features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The mean of the posterior, and the encoder's last features at strides 1, 2 and 4 of x, finest first."""
        encoder, by_size = self.autoencoder.encoder, {}
        blocks = encoder.down_blocks if self.has_posterior else encoder.layers
        layers = [layer for block in blocks for layer in getattr(block, "resnets", [block])]

        def keep(layer: nn.Module, given: tuple, made: Tensor) -> None:
            by_size[made.shape[-1]] = made

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        try:
            mean, _ = self.encode(x)
        finally:
            for hook in hooks:
                hook.remove()
        return mean, [by_size[x.shape[-1] // stride] for stride in (1, 2, 4)]

    def decode(self, z: Tensor) -> Tensor:
        """x (B, 1, H, W), near [-1, 1] but not clipped to it."""
        return self.autoencoder.decode(z).sample.mean(dim=1, keepdim=True)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(reconstruction, mean, logvar); with `noise` (B, C, h, w) z is a draw from the posterior, else the mean."""
        mean, logvar = self.encode(x)
        z = mean if noise is None or logvar is None else mean + torch.exp(0.5 * logvar) * noise
        return self.decode(z), mean, logvar

    def freeze_encoder(self) -> None:
        """Leave only what comes after z to train."""
        parts = [self.autoencoder.encoder, getattr(self.autoencoder, "quant_conv", None)]
        for part in filter(None, parts):
            part.requires_grad_(False)

    def recipe(self) -> dict:
        """How to build this network again without its source: class name and config, plain types."""
        config = {key: value for key, value in self.autoencoder.config.items() if not key.startswith("_")}
        return {"class": type(self.autoencoder).__name__, "config": json.loads(json.dumps(config))}


def rebuild_vae(checkpoint: dict) -> RadiographVAE:
    """The VAE of a phase-1 checkpoint, frozen, in eval mode."""
    recipe = checkpoint["recipe"]
    vae = RadiographVAE(AUTOENCODERS[recipe["class"]].from_config(recipe["config"]))
    vae.load_state_dict(checkpoint["weights"])
    return vae.requires_grad_(False).eval()


def pretrained_vae(config: VAEConfig) -> RadiographVAE:
    """The VAE to start from: "scratch", a local diffusers folder, or a hub name (weights as safetensors only).

    Raises UsageError if it cannot be had, is of another class, or does not shrink the image by 8.
    """
    source = config.pretrained
    if source == "scratch":
        autoencoder = _untrained(config)
    else:
        if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
            raise UsageError(
                f"vae.pretrained = {source} is no folder: "
                "give a diffusers folder, a hub name such as owner/name, or scratch"
            )
        autoencoder = _load(source)
    levels = autoencoder.config.get("decoder_block_out_channels") or autoencoder.config.block_out_channels
    shrinks = 2 ** (len(levels) - 1)
    if shrinks != VAE_DOWNSAMPLING:
        raise UsageError(
            f"vae.pretrained = {source} shrinks images by {shrinks}, this pipeline needs {VAE_DOWNSAMPLING}: "
            "use the VAE of a Stable Diffusion 1, 2 or 3"
        )
    vae = RadiographVAE(autoencoder)
    if config.freeze_encoder and source == "scratch":
        raise UsageError(
            "an untrained encoder cannot stay frozen: add --vae.freeze-encoder False to train from scratch"
        )
    if config.freeze_encoder:
        vae.freeze_encoder()
    return vae


def _load(source: str) -> AutoencoderKL | AutoencoderTiny:
    try:
        name = AutoencoderKL.load_config(source).get("_class_name")
        if name in AUTOENCODERS:
            return AUTOENCODERS[name].from_pretrained(source, use_safetensors=True, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"vae.pretrained = {source} cannot be loaded: {reason} (without network, give a local diffusers folder)"
        ) from error
    raise UsageError(f"vae.pretrained = {source} holds a {name}: use one of {', '.join(AUTOENCODERS)}")


def _untrained(config: VAEConfig) -> AutoencoderKL:
    channels = config.scratch_channels
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=config.scratch_latent_channels,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=math.gcd(8, *channels),
    )


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of N(mean, exp(logvar)) from N(0, 1), summed over latent entries, averaged over the batch.

    Kingma and Welling 2014, app. B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Mean structural similarity (Wang et al. 2004) of images in [-1, 1].

    Its comparison of means is for intensities from 0 on: near the zero of a signed scale it would turn negative.
    """
    return structural_similarity_index_measure(y + 1, x + 1, data_range=2.0)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (B,) of images (B, C, H, W) in [-1, 1]; inf where they are equal."""
    return 10 * torch.log10(2.0**2 / (x - y).square().flatten(1).mean(1))


@dataclass(frozen=True)
class VAELoss:
    """`total` to minimize; `terms` to log: loss_NAME unweighted, weighted_NAME as it enters, or n/a."""

    total: Tensor
    terms: dict[str, Tensor | str]


def vae_loss(x: Tensor, reconstruction: Tensor, mean: Tensor, logvar: Tensor | None, config: VAEConfig) -> VAELoss:
    """lambda_pix L1 + lambda_grad |grad| + lambda_hf |Laplacian| + lambda_ssim (1 - SSIM) + beta_kl KL; x in [-1, 1]"""
    l1, gradient, laplacian = residual_components(x, reconstruction)
    learns = torch.is_grad_enabled() and config.lambda_ssim > 0  # on a CPU its gradient costs as much as the decoder's
    with torch.set_grad_enabled(learns):
        ssim_error = 1 - ssim(x, reconstruction)
    parts = {
        "pix": (config.lambda_pix, l1.mean()),
        "grad": (config.lambda_grad, gradient.mean()),
        "hf": (config.lambda_hf, laplacian.mean()),
        "ssim": (config.lambda_ssim, ssim_error),
    }
    terms: dict[str, Tensor | str] = {"loss_kl": "n/a", "weighted_kl": "n/a"}
    if logvar is not None:
        parts["kl"] = (config.beta_kl, kl_divergence(mean, logvar))
    for name, (weight, value) in parts.items():
        terms[f"loss_{name}"] = value.detach()
        terms[f"weighted_{name}"] = (weight * value).detach()
    return VAELoss(sum(weight * value for weight, value in parts.values()), terms)
